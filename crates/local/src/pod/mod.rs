//! What a kubelet does: namespaces, volumes, environment, processes, probes.
//!
//! [`hold`] and [`run`] are the two programs that a pod consists of besides its own: the first makes the namespaces and
//! keeps them, the second enters them, becomes the container's user and turns into its program. [`lifecycle`] is the
//! supervisor's side: what is started when; `container` keeps one of them running.

pub(crate) mod cgroup;
mod container;
pub(crate) mod environment;
pub(crate) mod hold;
pub(crate) mod image;
pub(crate) mod lifecycle;
pub(crate) mod probe;
pub(crate) mod process;
pub(crate) mod quantity;
pub(crate) mod root;
pub(crate) mod run;
pub(crate) mod volume;
