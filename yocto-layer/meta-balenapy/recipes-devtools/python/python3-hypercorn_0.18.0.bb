# Generated from .ci/constraints.txt by yocto-layer/generate: do not edit.
SUMMARY = "A ASGI Server based on Hyper libraries and inspired by Gunicorn"
DESCRIPTION = "A ASGI Server based on Hyper libraries and inspired by Gunicorn. In the version that the engine is tested with."
HOMEPAGE = "https://pypi.org/project/hypercorn/"
BUGTRACKER = "https://pypi.org/project/hypercorn/"
SECTION = "devel/python"
CVE_PRODUCT = "hypercorn"
LICENSE = "MIT"
LIC_FILES_CHKSUM = "file://LICENSE;md5=8b55b0913488ba6e14df06d407f10691"

SRC_URI[sha256sum] = "d63267548939c46b0247dc8e5b45a9947590e35e64ee73a23c074aa3cf88e9da"

PYPI_PACKAGE = "hypercorn"

inherit pypi python_pep517 python3native python3-dir setuptools3-base

DEPENDS += "python3-pdm-backend-native"

RDEPENDS:${PN} += "\
    python3-asyncio \
    python3-h11 \
    python3-h2 \
    python3-io \
    python3-logging \
    python3-netclient \
    python3-priority \
    python3-wsproto \
"

BBCLASSEXTEND = "native nativesdk"
