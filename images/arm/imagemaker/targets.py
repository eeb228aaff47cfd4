"""The boards an image can be made for, as data. A new board is a new entry: see README, "How to add a board".

Partition numbers and names are the same idea everywhere: boot, root A, root B, state, data. GPT finds them by name.
A Raspberry Pi before the 4 reads an MBR only; there a partition is found by the disk's identifier and its number,
and each slot has a boot partition of its own, for that is what the firmware switches between.
"""

from __future__ import annotations

from dataclasses import dataclass

MIB = 1 << 20

# What every image has. conmon, crun, nftables, iproute2 and tini are the engine's; the rest is the system's.
PACKAGES = (
    "systemd systemd-sysv systemd-resolved systemd-timesyncd udev dbus kmod python3 crun conmon nftables iproute2 tini "
    "procps openssl e2fsprogs dosfstools fdisk openssh-server wpasupplicant"
).split()


@dataclass(frozen=True, slots=True)
class Partition:
    name: str  # the GPT name, and the label of its file system
    number: int
    mib: int  # data: what it has before it grows
    kind: str  # fat, root (a raw squashfs), ext4, extended


@dataclass(frozen=True, slots=True)
class Target:
    name: str
    architecture: str  # Debian's
    triple: str
    platforms: tuple[str, ...]  # of wheels
    table: str  # gpt or dos
    partitions: tuple[Partition, ...]
    switch: str  # how the other slot is tried: systemd-boot, or autoboot (Raspberry Pi)
    kernel: str  # the Debian package
    unpacked: tuple[str, ...] = ()  # packages whose files are taken without their scripts: firmware, boot loader
    command_line: str = ""
    device_trees: tuple[str, ...] = ()  # patterns below the kernel's dtbs directory
    initrd_modules: tuple[str, ...] = ()
    dropped_modules: tuple[str, ...] = ()

    def partition(self, name: str) -> Partition:
        return next(partition for partition in self.partitions if partition.name == name)

    def boot_partition(self, slot: str) -> Partition:
        """Where a slot's kernel lies."""
        return self.partition("boot" if self.switch == "systemd-boot" else f"boot-{slot}")

    def source(self, name: str) -> str:
        """A partition as fstab and the initrd name it."""
        if self.table == "gpt":
            return f"PARTLABEL={name}"
        return f"PARTUUID={DISK_ID:08x}-{self.partition(name).number:02x}"


DISK_ID = 0xBA1E0A01  # of an MBR

_GPT = (
    Partition("boot", 1, 256, "fat"),
    Partition("root-a", 2, 512, "root"),
    Partition("root-b", 3, 512, "root"),
    Partition("state", 4, 64, "ext4"),
    Partition("data", 5, 256, "ext4"),
)
_DOS = (
    Partition("boot", 1, 32, "fat"),
    Partition("boot-a", 2, 128, "fat"),
    Partition("boot-b", 3, 128, "fat"),
    Partition("rest", 4, 0, "extended"),
    Partition("root-a", 5, 512, "root"),
    Partition("root-b", 6, 512, "root"),
    Partition("state", 7, 64, "ext4"),
    Partition("data", 8, 256, "ext4"),
)
# Drivers of things that a board without screen, sound and server hardware does not have.
_DROPPED = (
    "drivers/gpu/drm/amd", "drivers/gpu/drm/nouveau", "drivers/gpu/drm/radeon", "drivers/infiniband",
    "drivers/scsi/lpfc", "drivers/scsi/qla2xxx", "drivers/scsi/mpt3sas",
    "drivers/scsi/megaraid", "drivers/scsi/hisi_sas", "drivers/isdn",
    "drivers/media/dvb-frontends", "drivers/media/tuners", "drivers/media/pci", "drivers/media/usb/dvb-usb",
    "drivers/media/usb/dvb-usb-v2", "drivers/net/ethernet/mellanox", "drivers/net/ethernet/chelsio",
    "drivers/net/ethernet/qlogic", "drivers/net/ethernet/cavium", "drivers/net/ethernet/netronome",
    "drivers/net/ethernet/sfc", "drivers/crypto/cavium", "drivers/target", "fs/ocfs2", "fs/xfs", "fs/btrfs", "fs/jfs",
    "fs/gfs2", "fs/reiserfs", "fs/ceph", "fs/afs", "fs/coda", "fs/orangefs", "net/ceph", "net/rds", "net/tipc",
)  # fmt: skip
_COMMON_MODULES = "crc32c_generic squashfs overlay ext4 vfat nls_ascii nls_cp437 nls_utf8".split()

GENERIC_ARM64_UEFI = Target(
    name="generic-arm64-uefi",
    architecture="arm64",
    triple="aarch64-linux-gnu",
    platforms=("manylinux2014_aarch64", "manylinux_2_17_aarch64", "manylinux_2_28_aarch64", "linux_aarch64"),
    table="gpt",
    partitions=_GPT,
    switch="systemd-boot",
    kernel="linux-image-arm64",
    unpacked=("systemd-boot", "systemd-boot-efi"),
    initrd_modules=tuple(
        _COMMON_MODULES
        + "virtio_pci virtio_mmio virtio_blk virtio_scsi nvme sd_mod ahci usb_storage uas xhci_pci xhci_plat_hcd "
        "mmc_block sdhci_acpi sdhci_pci sdhci_tegra sdhci_of_dwcmshc sdhci_of_arasan sdhci_iproc dw_mmc_rockchip "
        "pcie_tegra194 phy_tegra194_p2u pcie_rockchip_host phy_rockchip_pcie".split()
    ),
    dropped_modules=_DROPPED,
)
RPI_ARM64 = Target(
    name="rpi-arm64",
    architecture="arm64",
    triple="aarch64-linux-gnu",
    platforms=GENERIC_ARM64_UEFI.platforms,
    table="dos",
    partitions=_DOS,
    switch="autoboot",
    kernel="linux-image-arm64",
    unpacked=("raspi-firmware", "firmware-brcm80211"),
    command_line="console=tty0 console=ttyS1,115200",
    device_trees=("broadcom/bcm2837-rpi-*.dtb", "broadcom/bcm2711-rpi-*.dtb", "broadcom/bcm2712-*.dtb"),
    initrd_modules=tuple(
        _COMMON_MODULES
        + "bcm2835 sdhci_iproc sdhci_brcmstb mmc_block i2c_bcm2835 raspberrypi_hwmon bcm2835_wdt gpio_raspberrypi_exp "
        "clk_raspberrypi raspberrypi_power pcie_brcmstb reset_raspberrypi xhci_pci dwc2 usb_storage uas sd_mod "
        "virtio_pci virtio_mmio virtio_blk".split()
    ),
    dropped_modules=_DROPPED,
)
RPI_ARMHF = Target(
    name="rpi-armhf",
    architecture="armhf",
    triple="arm-linux-gnueabihf",
    platforms=("manylinux2014_armv7l", "manylinux_2_17_armv7l", "manylinux_2_31_armv7l", "linux_armv7l"),
    table="dos",
    partitions=_DOS,
    switch="autoboot",
    kernel="linux-image-armmp",
    unpacked=("raspi-firmware", "firmware-brcm80211"),
    command_line="console=tty0 console=ttyS1,115200",
    device_trees=("bcm2836-rpi-*.dtb", "bcm2837-rpi-*.dtb", "bcm2711-rpi-*.dtb"),
    initrd_modules=RPI_ARM64.initrd_modules,
    dropped_modules=_DROPPED,
)

TARGETS = {target.name: target for target in (GENERIC_ARM64_UEFI, RPI_ARM64, RPI_ARMHF)}
