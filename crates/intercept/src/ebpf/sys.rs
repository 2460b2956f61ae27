//! The few calls of bpf(2) that aya has no word for.
#![allow(unsafe_code)]

use std::{
    ffi::CString,
    fs, io,
    os::{
        fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd},
        unix::ffi::OsStrExt,
    },
    path::Path,
};

/// Opens what is pinned at `path`.
pub(super) fn open_pin(path: &Path) -> io::Result<OwnedFd> {
    let path = CString::new(path.as_os_str().as_bytes())?;
    // struct { __aligned_u64 pathname; __u32 bpf_fd; __u32 file_flags; }
    owned(BPF_OBJ_GET, pair(path.as_ptr() as u64), 0)
}

/// Pins a link at `path`.
pub(super) fn pin(link: &OwnedFd, path: &Path) -> io::Result<()> {
    let path = CString::new(path.as_os_str().as_bytes())?;
    let [low, high] = pair(path.as_ptr() as u64);
    bpf(BPF_OBJ_PIN, &[low, high, number(link), 0]).map(drop)
}

/// Attaches a program to a folder of cgroup2 or a network namespace, until the link is closed and unpinned.
pub(super) fn link(
    program: BorrowedFd<'_>,
    target: BorrowedFd<'_>,
    hook: u32,
) -> io::Result<OwnedFd> {
    // struct { __u32 prog_fd; __u32 target_fd; __u32 attach_type; __u32 flags; }
    owned(BPF_LINK_CREATE, [number(&program), number(&target)], hook)
}

/// Takes a link's program away from where it is attached, at once and whoever else has the link open.
pub(super) fn detach(link: &OwnedFd) -> io::Result<()> {
    bpf(BPF_LINK_DETACH, &[number(link), 0, 0, 0]).map(drop)
}

/// A field of what /proc tells of a descriptor: of a link `cgroup_id` or `netns_ino`, which are 0 once that is gone.
pub(super) fn field(fd: &OwnedFd, name: &str) -> Option<u64> {
    let text = fs::read_to_string(format!("/proc/self/fdinfo/{}", fd.as_raw_fd())).ok()?;
    text.lines().find_map(|line| {
        let (found, value) = line.split_once(':')?;
        (found == name).then(|| value.trim().parse().ok())?
    })
}

fn number(fd: &impl AsRawFd) -> u32 {
    // A descriptor that is open is not negative.
    fd.as_raw_fd() as u32
}

/// A 64-bit value as the kernel finds it in memory.
fn pair(value: u64) -> [u32; 2] {
    let bytes = value.to_ne_bytes();
    let half =
        |at: usize| u32::from_ne_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]]);
    [half(0), half(4)]
}

fn owned(command: libc::c_long, [a, b]: [u32; 2], c: u32) -> io::Result<OwnedFd> {
    let fd = bpf(command, &[a, b, c, 0])?;
    // SAFETY: the kernel just made this descriptor for us; nobody else has it.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// The commands that are used here have attributes of at most sixteen bytes.
#[repr(C, align(8))]
struct Attributes([u32; 4]);

fn bpf(command: libc::c_long, attributes: &[u32; 4]) -> io::Result<i32> {
    let attributes = Attributes(*attributes);
    // SAFETY: the attributes outlive the call and their size is given; a path that they point to is kept by the caller.
    let rc = unsafe {
        libc::syscall(
            libc::SYS_bpf,
            command,
            &raw const attributes,
            size_of::<Attributes>(),
        )
    };
    match rc {
        -1 => Err(io::Error::last_os_error()),
        rc => Ok(rc as i32),
    }
}

const BPF_OBJ_PIN: libc::c_long = 6;
const BPF_OBJ_GET: libc::c_long = 7;
const BPF_LINK_CREATE: libc::c_long = 28;
const BPF_LINK_DETACH: libc::c_long = 34;
