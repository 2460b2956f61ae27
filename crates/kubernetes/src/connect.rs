//! Finding the API server.

use std::path::PathBuf;

use kube::{
    Client, Config,
    config::{KubeConfigOptions, Kubeconfig},
};

use crate::ClusterError;

/// How to reach the API server.
#[derive(Debug, Clone, Default)]
pub struct Access {
    /// A kubeconfig; without one `$KUBECONFIG`, the service account of this pod or `~/.kube/config` are tried in turn.
    pub kubeconfig: Option<PathBuf>,
    /// The context of the kubeconfig; its current one if not given.
    pub context: Option<String>,
}

/// A client for the API server. Nothing is asked yet.
pub async fn connect(access: &Access) -> Result<Client, ClusterError> {
    let config = match &access.kubeconfig {
        Some(path) => {
            let wrong = |e: kube::config::KubeconfigError| ClusterError::Kubeconfig {
                path: path.display().to_string(),
                why: e.to_string(),
            };
            let read = Kubeconfig::read_from(path).map_err(wrong)?;
            Config::from_custom_kubeconfig(read, &options(access))
                .await
                .map_err(wrong)?
        }
        None if std::env::var_os("KUBECONFIG").is_some() || access.context.is_some() => {
            Config::from_kubeconfig(&options(access))
                .await
                .map_err(|e| ClusterError::Kubeconfig {
                    path: "(KUBECONFIG)".to_owned(),
                    why: e.to_string(),
                })?
        }
        None => match Config::incluster() {
            Ok(config) => config,
            Err(e) => Config::from_kubeconfig(&options(access))
                .await
                .map_err(|_| ClusterError::NotInCluster(e.to_string()))?,
        },
    };
    Client::try_from(config).map_err(|e| ClusterError::Client(e.to_string()))
}

fn options(access: &Access) -> KubeConfigOptions {
    KubeConfigOptions {
        context: access.context.clone(),
        ..KubeConfigOptions::default()
    }
}
