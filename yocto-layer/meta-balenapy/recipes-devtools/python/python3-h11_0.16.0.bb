# Generated from .ci/constraints.txt by yocto-layer/generate: do not edit.
SUMMARY = "A pure-Python, bring-your-own-I/O implementation of HTTP/1.1"
DESCRIPTION = "A pure-Python, bring-your-own-I/O implementation of HTTP/1.1. In the version that the engine is tested with."
HOMEPAGE = "https://pypi.org/project/h11/"
BUGTRACKER = "https://pypi.org/project/h11/"
SECTION = "devel/python"
CVE_PRODUCT = "h11"
LICENSE = "MIT"
LIC_FILES_CHKSUM = "file://LICENSE.txt;md5=f5501d19c3116f4aaeef89369f458693"

SRC_URI[sha256sum] = "4e35b956cf45792e4caa5885e69fba00bdbc6ffafbfa020300e549b208ee5ff1"

PYPI_PACKAGE = "h11"

inherit pypi python_setuptools_build_meta

RDEPENDS:${PN} += "\
    python3-core \
"

BBCLASSEXTEND = "native nativesdk"
