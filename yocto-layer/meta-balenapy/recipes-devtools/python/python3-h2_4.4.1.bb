# Generated from .ci/constraints.txt by yocto-layer/generate: do not edit.
SUMMARY = "Pure-Python HTTP/2 protocol implementation"
DESCRIPTION = "Pure-Python HTTP/2 protocol implementation. In the version that the engine is tested with."
HOMEPAGE = "https://pypi.org/project/h2/"
BUGTRACKER = "https://pypi.org/project/h2/"
SECTION = "devel/python"
CVE_PRODUCT = "h2"
LICENSE = "MIT"
LIC_FILES_CHKSUM = "file://LICENSE;md5=aa3b9b4395563dd427be5f022ec321c1"

SRC_URI[sha256sum] = "4e866ffb1a869ae14dd9b5e6beb5c24a13da0495ad72b65925ded182521c1516"

PYPI_PACKAGE = "h2"

inherit pypi python_setuptools_build_meta

do_configure:prepend() {
    sed -i -e 's/^license *= *\("[^"]*"\)/license = {text = \1}/' -e '/^license-files *=/d' \
        ${S}/pyproject.toml
}

RDEPENDS:${PN} += "\
    python3-core \
    python3-hpack \
    python3-hyperframe \
"

BBCLASSEXTEND = "native nativesdk"
