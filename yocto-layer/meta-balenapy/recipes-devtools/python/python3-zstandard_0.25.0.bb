# Generated from .ci/constraints.txt by yocto-layer/generate: do not edit.
SUMMARY = "Zstandard bindings for Python"
DESCRIPTION = "Zstandard bindings for Python. In the version that the engine is tested with."
HOMEPAGE = "https://pypi.org/project/zstandard/"
BUGTRACKER = "https://pypi.org/project/zstandard/"
SECTION = "devel/python"
CVE_PRODUCT = "zstandard"
LICENSE = "BSD-3-Clause"
LIC_FILES_CHKSUM = "file://LICENSE;md5=3ae87c50fd64b6f0942823686871e758"

SRC_URI[sha256sum] = "7713e1179d162cf5c7906da876ec2ccb9c3a9dcbdffef0cc7f70c3667a205f0b"

PYPI_PACKAGE = "zstandard"

inherit pypi python_setuptools_build_meta

do_configure:prepend() {
    sed -i -e 's/^license *= *\("[^"]*"\)/license = {text = \1}/' -e '/^license-files *=/d' \
        ${S}/pyproject.toml
}

# Its own copy of libzstd is what upstream tests; the second backend is not installed.
do_install:append() {
    rm -f ${D}${PYTHON_SITEPACKAGES_DIR}/zstandard/_cffi*.so
}

RDEPENDS:${PN} += "\
    python3-io \
"

BBCLASSEXTEND = "native nativesdk"
