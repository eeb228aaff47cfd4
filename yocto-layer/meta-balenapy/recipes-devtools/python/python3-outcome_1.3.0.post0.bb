# Generated from .ci/constraints.txt by yocto-layer/generate: do not edit.
SUMMARY = "Capture the outcome of Python function calls"
DESCRIPTION = "Capture the outcome of Python function calls. In the version that the engine is tested with."
HOMEPAGE = "https://pypi.org/project/outcome/"
BUGTRACKER = "https://pypi.org/project/outcome/"
SECTION = "devel/python"
CVE_PRODUCT = "outcome"
LICENSE = "MIT | Apache-2.0"
LIC_FILES_CHKSUM = "\
    file://LICENSE;md5=fa7b86389e58dd4087a8d2b833e5fe96 \
    file://LICENSE.APACHE2;md5=3b83ef96387f14655fc854ddc3c6bd57 \
    file://LICENSE.MIT;md5=e62ba5042d5983462ad229f5aec1576c \
"

SRC_URI[sha256sum] = "9dcf02e65f2971b80047b377468e72a268e15c0af3cf1238e6ff14f7f91143b8"

PYPI_PACKAGE = "outcome"

inherit pypi python_setuptools_build_meta

RDEPENDS:${PN} += "\
    python3-core \
"

BBCLASSEXTEND = "native nativesdk"
