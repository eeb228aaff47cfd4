# nooelint: oelint.var.bbclassextend - names for the device
SUMMARY = "balenapy under the names and paths of balena-engine"
DESCRIPTION = "\
    Drop-in for meta-balena: its units, healthchecks and scripts call balenad, balena-engine, \
    balena-engine-containerd-ctr and kin; here they are balenapy.\
"
HOMEPAGE = "https://github.com/balenapy/balenapy"
BUGTRACKER = "https://github.com/balenapy/balenapy/issues"
SECTION = "containers"
LICENSE = "Apache-2.0"
CVE_PRODUCT = "balenapy"
# nooelint: oelint.var.licenseremotefile - the names are ours, of this layer
LIC_FILES_CHKSUM = "file://${COMMON_LICENSE_DIR}/Apache-2.0;md5=89aea4e17d99a7cacdbeed46a0096b10"

PROVIDES = "balena balena-engine"

SRC_URI = "file://balena-engine-names"

S = "${WORKDIR}"

inherit allarch

BALENA_NAMES = "\
    balena \
    balena-containerd-ctr \
    balena-daemon \
    balena-engine-containerd \
    balena-engine-containerd-ctr \
    balena-engine-containerd-shim \
    balena-engine-daemon \
    balena-engine-init \
    balena-engine-proxy \
    balena-engine-runc \
    balena-runc \
    balenad \
"

do_configure[noexec] = "1"
do_compile[noexec] = "1"

do_install() {
    install -d ${D}${bindir} ${D}${sysconfdir}/balena-engine
    install -m 0755 ${WORKDIR}/balena-engine-names ${D}${bindir}/balena-engine-names
    for name in ${BALENA_NAMES}; do
        ln -s balena-engine-names ${D}${bindir}/$name
    done
}

RDEPENDS:${PN} = "balenapy tini"

RPROVIDES:${PN} = "balena balena-engine"
RREPLACES:${PN} = "balena balena-engine"
RCONFLICTS:${PN} = "balena balena-engine"
