# Generated from .ci/constraints.txt by yocto-layer/generate: do not edit.
SUMMARY = "Pure-Python WebSocket protocol implementation"
DESCRIPTION = "Pure-Python WebSocket protocol implementation. In the version that the engine is tested with."
HOMEPAGE = "https://pypi.org/project/wsproto/"
BUGTRACKER = "https://pypi.org/project/wsproto/"
SECTION = "devel/python"
CVE_PRODUCT = "wsproto"
LICENSE = "MIT"
LIC_FILES_CHKSUM = "file://LICENSE;md5=69fabf732409f4ac61875827b258caaf"

SRC_URI[sha256sum] = "b86885dcf294e15204919950f666e06ffc6c7c114ca900b060d6e16293528294"

PYPI_PACKAGE = "wsproto"

inherit pypi python_setuptools_build_meta

do_configure:prepend() {
    sed -i -e 's/^license *= *\("[^"]*"\)/license = {text = \1}/' -e '/^license-files *=/d' \
        ${S}/pyproject.toml
}

RDEPENDS:${PN} += "\
    python3-core \
    python3-h11 \
"

BBCLASSEXTEND = "native nativesdk"
