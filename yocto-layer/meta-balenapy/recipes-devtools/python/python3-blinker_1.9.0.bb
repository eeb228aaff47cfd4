# Generated from .ci/constraints.txt by yocto-layer/generate: do not edit.
SUMMARY = "Fast, simple object-to-object and broadcast signaling"
DESCRIPTION = "Fast, simple object-to-object and broadcast signaling. In the version that the engine is tested with."
HOMEPAGE = "https://pypi.org/project/blinker/"
BUGTRACKER = "https://pypi.org/project/blinker/"
SECTION = "devel/python"
CVE_PRODUCT = "blinker"
LICENSE = "MIT"
LIC_FILES_CHKSUM = "file://LICENSE.txt;md5=42cd19c88fc13d1307a4efd64ee90e4e"

SRC_URI[sha256sum] = "b4ce2265a7abece45e7cc896e98dbebe6cead56bcf805a3d23136d145f5445bf"

PYPI_PACKAGE = "blinker"

inherit pypi python_flit_core

RDEPENDS:${PN} += "\
    python3-core \
"

BBCLASSEXTEND = "native nativesdk"
