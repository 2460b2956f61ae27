//! The mesh on one machine: a folder of Kubernetes and Istio YAML becomes running pods.
//!
//! Read in this order. [`objects`] plays API server and controllers: it reads the user's folder, turns workloads into
//! pods, completes them (addresses, injection, status) and publishes the folder that `control --config` watches.
//! [`pod`] plays kubelet: a pod is a network and a mount namespace, its containers are processes of this same program
//! or of the machine. [`node`] is the network between them: a bridge, service addresses and names, in a namespace of
//! its own, so that nothing of the machine's own network is touched. [`supervisor`] ties them together, [`command`] is
//! what a user types, and [`samples`] are the programs that demo pods run.

pub mod command;
mod error;
mod exec;
mod logs;
mod node;
mod objects;
mod pod;
mod ps;
pub mod reach;
pub mod samples;
mod state;
mod supervisor;
mod up;

pub use error::Error;
