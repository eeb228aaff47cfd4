# Generated from .ci/constraints.txt by yocto-layer/generate: do not edit.
SUMMARY = "Pure-Python HPACK header encoding"
DESCRIPTION = "Pure-Python HPACK header encoding. In the version that the engine is tested with."
HOMEPAGE = "https://pypi.org/project/hpack/"
BUGTRACKER = "https://pypi.org/project/hpack/"
SECTION = "devel/python"
CVE_PRODUCT = "hpack"
LICENSE = "MIT"
LIC_FILES_CHKSUM = "file://LICENSE;md5=5bf1c68e73fbaec2b1687b7e71514393"

SRC_URI[sha256sum] = "0895cfa3b5531fc65fe439c05eb65144f123bf7a394fcaa56aa423548d8e45c0"

PYPI_PACKAGE = "hpack"

inherit pypi python_setuptools_build_meta

do_configure:prepend() {
    sed -i -e 's/^license *= *\("[^"]*"\)/license = {text = \1}/' -e '/^license-files *=/d' \
        ${S}/pyproject.toml
}

RDEPENDS:${PN} += "\
    python3-core \
"

BBCLASSEXTEND = "native nativesdk"
