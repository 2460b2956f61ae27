//! The root file system of a pod: a tmpfs with the machine's programs, read-only, and an /etc of its own.
//!
//! There are no images here. A container sees /usr (and what goes with it) of this machine, so that `curl` or `iptables`
//! work in it, our programs in /usr/local/bin, and nothing of /home, /root, /srv or the machine's configuration.

use std::{
    fs,
    os::unix::fs::{PermissionsExt, symlink},
    path::Path,
};

use nix::mount::{MsFlags, mount};

use super::hold::HoldSpec;
use crate::error::{Doing, Result};

/// Builds the tree below `spec.root`; must run in the pod's own mount namespace.
pub(crate) fn build(spec: &HoldSpec) -> Result<()> {
    let root = &spec.root;
    mount(
        Some("tmpfs"),
        root,
        Some("tmpfs"),
        MsFlags::MS_NOSUID,
        Some("mode=755,size=256m"),
    )
    .doing(|| format!("mount a tmpfs on {}", root.display()))?;
    for (dir, mode) in [
        ("tmp", 0o1777),
        ("run", 0o755),
        ("run/secrets", 0o755),
        ("var", 0o755),
        ("var/lib", 0o755),
        ("var/log", 0o755),
        ("var/tmp", 0o1777),
        ("home", 0o755),
        ("root", 0o700),
        ("etc", 0o755),
        ("proc", 0o555),
        ("sys", 0o555),
        ("dev", 0o755),
        ("mnt", 0o755),
    ] {
        directory(&root.join(dir), mode)?;
    }
    // By this `down` knows the processes of a mesh whose supervisor has gone.
    let marker = root.join(MARKER.trim_start_matches('/'));
    fs::write(&marker, spec.bin.as_os_str().as_encoded_bytes())
        .doing(|| format!("write {}", marker.display()))?;
    symlink("/run", root.join("var/run")).doing(|| "link /var/run".to_owned())?;
    for name in ["usr", "bin", "sbin", "lib", "lib32", "lib64", "libx32"] {
        let source = Path::new("/").join(name);
        if let Ok(target) = fs::read_link(&source) {
            symlink(&target, root.join(name)).doing(|| format!("link /{name}"))?;
        } else if source.is_dir() {
            directory(&root.join(name), 0o755)?;
            bind(&source, &root.join(name), true)?;
        }
    }
    if root.join("usr/local/bin").is_dir() {
        bind(&spec.bin, &root.join("usr/local/bin"), true)?;
    }
    bind(Path::new("/proc"), &root.join("proc"), false)?;
    bind(Path::new("/dev"), &root.join("dev"), false)?;
    // A sysfs shows the network of the namespace in which it was mounted.
    mount(
        Some("sysfs"),
        &root.join("sys"),
        Some("sysfs"),
        MsFlags::MS_RDONLY,
        None::<&str>,
    )
    .doing(|| "mount /sys".to_owned())?;
    etc(spec)
}

fn etc(spec: &HoldSpec) -> Result<()> {
    let etc = spec.root.join("etc");
    let write = |name: &str, text: &str| {
        fs::write(etc.join(name), text).doing(|| format!("write the pod's /etc/{name}"))
    };
    write("hosts", &spec.hosts)?;
    write("resolv.conf", &spec.resolv_conf)?;
    write("hostname", &format!("{}\n", spec.hostname))?;
    write(
        "passwd",
        "root:x:0:0:root:/root:/bin/sh\n\
         app:x:1000:1000:app:/:/bin/sh\n\
         istio-proxy:x:1337:1337:istio-proxy:/:/usr/sbin/nologin\n\
         nobody:x:65534:65534:nobody:/:/usr/sbin/nologin\n",
    )?;
    write(
        "group",
        "root:x:0:\napp:x:1000:\nistio-proxy:x:1337:\nnogroup:x:65534:\n",
    )?;
    write(
        "nsswitch.conf",
        "passwd: files\ngroup: files\nhosts: files dns\nprotocols: files\nservices: files\n",
    )?;
    // What the machine's programs need to start and to speak TLS; links (Debian's alternatives) stay links.
    for name in [
        "ld.so.cache",
        "ld.so.conf",
        "localtime",
        "protocols",
        "services",
        "ethertypes",
        "xtables.conf",
    ] {
        let source = Path::new("/etc").join(name);
        if source.exists() {
            fs::copy(&source, etc.join(name)).doing(|| format!("copy {}", source.display()))?;
        }
    }
    for name in [
        "alternatives",
        "ssl",
        "ca-certificates",
        "iproute2",
        "ld.so.conf.d",
    ] {
        let source = Path::new("/etc").join(name);
        if source.is_dir() {
            directory(&etc.join(name), 0o755)?;
            bind(&source, &etc.join(name), true)?;
        }
    }
    Ok(())
}

/// A file in every pod that names the mesh it belongs to, by its folder of programs.
pub(crate) const MARKER: &str = "/run/.outrigger-mesh";

/// Makes a folder with exactly these rights, whatever the umask.
pub(crate) fn directory(path: &Path, mode: u32) -> Result<()> {
    fs::create_dir_all(path)
        .and_then(|()| fs::set_permissions(path, fs::Permissions::from_mode(mode)))
        .doing(|| format!("make {}", path.display()))
}

fn bind(source: &Path, target: &Path, read_only: bool) -> Result<()> {
    mount(
        Some(source),
        target,
        None::<&str>,
        MsFlags::MS_BIND | MsFlags::MS_REC,
        None::<&str>,
    )
    .doing(|| format!("mount {} on {}", source.display(), target.display()))?;
    if read_only {
        let flags = MsFlags::MS_REMOUNT | MsFlags::MS_BIND | MsFlags::MS_RDONLY;
        mount(None::<&str>, target, None::<&str>, flags, None::<&str>)
            .doing(|| format!("protect {}", target.display()))?;
    }
    Ok(())
}
