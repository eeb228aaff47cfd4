# Generated from .ci/constraints.txt by yocto-layer/generate: do not edit.
SUMMARY = "A Quart extension to provide trio support"
DESCRIPTION = "A Quart extension to provide trio support. In the version that the engine is tested with."
HOMEPAGE = "https://pypi.org/project/quart-trio/"
BUGTRACKER = "https://pypi.org/project/quart-trio/"
SECTION = "devel/python"
CVE_PRODUCT = "quart_trio"
LICENSE = "MIT"
LIC_FILES_CHKSUM = "file://LICENSE;md5=8b55b0913488ba6e14df06d407f10691"

SRC_URI[sha256sum] = "02ec840998d0e897eeabc0e5f48c12d8204e91a823870fd0b8b2f7331b44198c"

PYPI_PACKAGE = "quart_trio"

inherit pypi python_pep517 python3native python3-dir setuptools3-base

DEPENDS += "python3-pdm-backend-native"

RDEPENDS:${PN} += "\
    python3-core \
    python3-hypercorn \
    python3-quart \
    python3-trio \
"

BBCLASSEXTEND = "native nativesdk"
