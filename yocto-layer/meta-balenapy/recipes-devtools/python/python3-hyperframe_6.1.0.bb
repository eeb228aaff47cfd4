# Generated from .ci/constraints.txt by yocto-layer/generate: do not edit.
SUMMARY = "Pure-Python HTTP/2 framing"
DESCRIPTION = "Pure-Python HTTP/2 framing. In the version that the engine is tested with."
HOMEPAGE = "https://pypi.org/project/hyperframe/"
BUGTRACKER = "https://pypi.org/project/hyperframe/"
SECTION = "devel/python"
CVE_PRODUCT = "hyperframe"
LICENSE = "MIT"
LIC_FILES_CHKSUM = "file://LICENSE;md5=5bf1c68e73fbaec2b1687b7e71514393"

SRC_URI[sha256sum] = "f630908a00854a7adeabd6382b43923a4c4cd4b821fcb527e6ab9e15382a3b08"

PYPI_PACKAGE = "hyperframe"

inherit pypi python_setuptools_build_meta

RDEPENDS:${PN} += "\
    python3-core \
"

BBCLASSEXTEND = "native nativesdk"
