# Generated from .ci/constraints.txt by yocto-layer/generate: do not edit.
SUMMARY = "Python client for the Prometheus monitoring system"
DESCRIPTION = "Python client for the Prometheus monitoring system. In the version that the engine is tested with."
HOMEPAGE = "https://pypi.org/project/prometheus-client/"
BUGTRACKER = "https://pypi.org/project/prometheus-client/"
SECTION = "devel/python"
CVE_PRODUCT = "prometheus_client"
LICENSE = "Apache-2.0 & BSD-2-Clause"
LIC_FILES_CHKSUM = "\
    file://LICENSE;md5=86d3f3a95c324c9479bd8986968f4327 \
    file://NOTICE;md5=4951b46e0743f84957d24051dcbdc0ae \
"

SRC_URI[sha256sum] = "04a91bcf94e2cf74a44a1a874d651a2e853ed354b6e822f3b7487751465d5c2b"

PYPI_PACKAGE = "prometheus_client"

inherit pypi python_setuptools_build_meta

do_configure:prepend() {
    sed -i -e 's/^license *= *\("[^"]*"\)/license = {text = \1}/' -e '/^license-files *=/d' \
        ${S}/pyproject.toml
}

RDEPENDS:${PN} += "\
    python3-core \
"

BBCLASSEXTEND = "native nativesdk"
