# Generated from .ci/constraints.txt by yocto-layer/generate: do not edit.
SUMMARY = "A pure-Python implementation of the HTTP/2 priority tree"
DESCRIPTION = "A pure-Python implementation of the HTTP/2 priority tree. In the version that the engine is tested with."
HOMEPAGE = "https://pypi.org/project/priority/"
BUGTRACKER = "https://pypi.org/project/priority/"
SECTION = "devel/python"
CVE_PRODUCT = "priority"
LICENSE = "MIT"
LIC_FILES_CHKSUM = "file://LICENSE;md5=ae57d8a09fc8b6b164d7357339619045"

SRC_URI[sha256sum] = "c965d54f1b8d0d0b19479db3924c7c36cf672dbf2aec92d43fbdaf4492ba18c0"

PYPI_PACKAGE = "priority"

inherit pypi python_setuptools_build_meta

RDEPENDS:${PN} += "\
    python3-core \
"

BBCLASSEXTEND = "native nativesdk"
