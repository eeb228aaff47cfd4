# Generated from .ci/constraints.txt by yocto-layer/generate: do not edit.
SUMMARY = "A Python ASGI web framework with the same API as Flask"
DESCRIPTION = "A Python ASGI web framework with the same API as Flask. In the version that the engine is tested with."
HOMEPAGE = "https://pypi.org/project/quart/"
BUGTRACKER = "https://pypi.org/project/quart/"
SECTION = "devel/python"
CVE_PRODUCT = "quart"
LICENSE = "MIT"
LIC_FILES_CHKSUM = "file://LICENSE.txt;md5=a30779ca15b5a14f8a5d6a5462434739"

SRC_URI[sha256sum] = "6ba567bb29e0ea66f7c0a0297c2b6225bb531e37dbf9b75dbf4a6e1713c4c934"

PYPI_PACKAGE = "quart"

inherit pypi python_flit_core

do_configure:prepend() {
    sed -i -e 's/^license *= *\("[^"]*"\)/license = {text = \1}/' -e '/^license-files *=/d' \
        ${S}/pyproject.toml
}

RDEPENDS:${PN} += "\
    python3-aiofiles \
    python3-asyncio \
    python3-blinker \
    python3-click \
    python3-datetime \
    python3-flask \
    python3-hypercorn \
    python3-io \
    python3-itsdangerous \
    python3-jinja2 \
    python3-json \
    python3-logging \
    python3-markupsafe \
    python3-netclient \
    python3-werkzeug \
"

BBCLASSEXTEND = "native nativesdk"
