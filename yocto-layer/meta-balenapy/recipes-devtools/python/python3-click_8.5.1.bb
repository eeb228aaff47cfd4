# Generated from .ci/constraints.txt by yocto-layer/generate: do not edit.
SUMMARY = "Composable command line interface toolkit"
DESCRIPTION = "Composable command line interface toolkit. In the version that the engine is tested with."
HOMEPAGE = "https://pypi.org/project/click/"
BUGTRACKER = "https://pypi.org/project/click/"
SECTION = "devel/python"
CVE_PRODUCT = "click"
LICENSE = "BSD-3-Clause"
LIC_FILES_CHKSUM = "file://LICENSE.txt;md5=1fa98232fd645608937a0fdc82e999b8"

SRC_URI[sha256sum] = "9bbfada76703fd1d784b83eea012e3e8c6a001a876543ef104fa56aaaeb072b4"

PYPI_PACKAGE = "click"

inherit pypi python_flit_core

do_configure:prepend() {
    sed -i -e 's/^license *= *\("[^"]*"\)/license = {text = \1}/' -e '/^license-files *=/d' \
        ${S}/pyproject.toml
}

RDEPENDS:${PN} += "\
    python3-io \
    python3-threading \
"

BBCLASSEXTEND = "native nativesdk"
