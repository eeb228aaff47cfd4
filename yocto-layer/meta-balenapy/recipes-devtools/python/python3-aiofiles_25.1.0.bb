# Generated from .ci/constraints.txt by yocto-layer/generate: do not edit.
SUMMARY = "File support for asyncio"
DESCRIPTION = "File support for asyncio. In the version that the engine is tested with."
HOMEPAGE = "https://pypi.org/project/aiofiles/"
BUGTRACKER = "https://pypi.org/project/aiofiles/"
SECTION = "devel/python"
CVE_PRODUCT = "aiofiles"
LICENSE = "Apache-2.0"
LIC_FILES_CHKSUM = "\
    file://LICENSE;md5=d2794c0df5b907fdace235a619d80314 \
    file://NOTICE;md5=eb8754e6966f854f8c3a6d860e9ce3d0 \
"

SRC_URI[sha256sum] = "a8d728f0a29de45dc521f18f07297428d56992a742f0cd2701ba86e44d23d5b2"

PYPI_PACKAGE = "aiofiles"

inherit pypi python_pep517 python3native python3-dir setuptools3-base

DEPENDS += "python3-hatch-vcs-native python3-hatchling-native"

RDEPENDS:${PN} += "\
    python3-core \
"

BBCLASSEXTEND = "native nativesdk"
