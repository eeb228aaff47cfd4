# Generated from .ci/constraints.txt by yocto-layer/generate: do not edit.
SUMMARY = "Sniff out which async library your code is running under"
DESCRIPTION = "Sniff out which async library your code is running under. In the version that the engine is tested with."
HOMEPAGE = "https://pypi.org/project/sniffio/"
BUGTRACKER = "https://pypi.org/project/sniffio/"
SECTION = "devel/python"
CVE_PRODUCT = "sniffio"
LICENSE = "MIT | Apache-2.0"
LIC_FILES_CHKSUM = "\
    file://LICENSE;md5=fa7b86389e58dd4087a8d2b833e5fe96 \
    file://LICENSE.APACHE2;md5=3b83ef96387f14655fc854ddc3c6bd57 \
    file://LICENSE.MIT;md5=e62ba5042d5983462ad229f5aec1576c \
"

SRC_URI[sha256sum] = "f4324edc670a0f49750a81b895f35c3adb843cca46f0530f79fc1babb23789dc"

PYPI_PACKAGE = "sniffio"

inherit pypi python_setuptools_build_meta

RDEPENDS:${PN} += "\
    python3-core \
"

BBCLASSEXTEND = "native nativesdk"
