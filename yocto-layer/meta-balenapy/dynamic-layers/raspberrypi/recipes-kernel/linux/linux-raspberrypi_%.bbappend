# What containers want of the kernel, for distributions that ask for it: DISTRO_FEATURES has balenapy.
# nooelint: oelint.vars.noncoreoverride - changes nothing without that feature
FILESEXTRAPATHS:prepend := "${THISDIR}/../../../../recipes-kernel/linux/files:"

# nooelint: oelint.vars.noncoreoverride - as above
SRC_URI += "${@bb.utils.contains('DISTRO_FEATURES', 'balenapy', 'file://balenapy.cfg', '', d)}"
