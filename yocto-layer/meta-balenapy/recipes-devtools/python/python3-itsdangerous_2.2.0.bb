# Generated from .ci/constraints.txt by yocto-layer/generate: do not edit.
SUMMARY = "Safely pass data to untrusted environments and back"
DESCRIPTION = "Safely pass data to untrusted environments and back. In the version that the engine is tested with."
HOMEPAGE = "https://pypi.org/project/itsdangerous/"
BUGTRACKER = "https://pypi.org/project/itsdangerous/"
SECTION = "devel/python"
CVE_PRODUCT = "itsdangerous"
LICENSE = "BSD-3-Clause"
LIC_FILES_CHKSUM = "file://LICENSE.txt;md5=4cda9a0ebd516714f360b0e9418cfb37"

SRC_URI[sha256sum] = "e0050c0b7da1eea53ffaf149c0cfbb5c6e2e2b69c4bef22c81fa6eb73e5f6173"

PYPI_PACKAGE = "itsdangerous"

inherit pypi python_flit_core

RDEPENDS:${PN} += "\
    python3-core \
"

BBCLASSEXTEND = "native nativesdk"
