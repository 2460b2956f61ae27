//! The task of one stream.

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use base::spiffe::Identity;
use tokio::sync::mpsc;
use tokio_stream::{StreamExt, wrappers::ReceiverStream};
use tonic::Status;
use tracing::{debug, info};
use xds::{
    Mode,
    server::{Handler, Incoming, Request, Response, Responses},
    type_url::HEALTH_INFORMATION,
};

use super::{Connection, Server, connection::Answer, sleep_until, status};
use crate::{
    ca::service::{Authenticator, Credentials},
    model::Node,
};

/// The end of a stream that the client reads from.
type Out = mpsc::Sender<Result<Response, Status>>;

/// What xds calls.
#[derive(Debug)]
pub struct Ads {
    server: Arc<Server>,
    /// Proves who opens a stream; without one everybody may ask for everything, as on port 15010.
    authenticator: Option<Authenticator>,
}

impl Ads {
    /// For everybody who can reach the port.
    pub fn open(server: Arc<Server>) -> Self {
        Self {
            server,
            authenticator: None,
        }
    }

    /// For workloads that prove who they are, each for itself.
    pub fn authenticated(server: Arc<Server>, authenticator: Authenticator) -> Self {
        Self {
            server,
            authenticator: Some(authenticator),
        }
    }
}

impl Handler for Ads {
    async fn open(
        &self,
        mode: Mode,
        request: tonic::Request<Incoming>,
    ) -> Result<Responses, Status> {
        let server = &self.server;
        if !server.is_ready() {
            return Err(Status::unavailable(
                "the configuration is not read yet; try again",
            ));
        }
        let credentials = Credentials::of(&request);
        let incoming = request.into_inner();
        let caller = match &self.authenticator {
            Some(authenticator) => Some(authenticator.caller(&credentials).await?),
            None => None,
        };
        // Deep enough for one push; a client that does not read is not written to.
        let (send, receive) = mpsc::channel(8);
        tokio::spawn(serve(
            server.clone(),
            mode,
            incoming,
            send,
            credentials.peer().name(),
            caller,
        ));
        Ok(Box::pin(ReceiverStream::new(receive)))
    }
}

async fn serve(
    server: Arc<Server>,
    mode: Mode,
    mut incoming: Incoming,
    out: Out,
    peer: String,
    caller: Option<Identity>,
) {
    let (first, node) = match introduce(&mut incoming, caller.as_ref()).await {
        Ok(Some(found)) => found,
        Ok(None) => return,
        Err(status) => {
            info!("ADS: stream of {peer} refused: {}", status.message());
            server.metrics.count("istiod_connection_failures", &[]);
            let _ = out.send(Err(status)).await;
            return;
        }
    };
    // Registered before the current state is read: no push can fall between the two.
    let connection = server.register(|number| Connection::new(number, node, mode, peer, caller));
    let _registered = Registered {
        server: &server,
        connection: &connection,
    };
    info!(
        "ADS: new connection of {} from {}",
        connection.id, connection.peer
    );
    if handle(&server, &connection, &first, &out).await.is_err() {
        return;
    }
    loop {
        let removals = connection
            .removals_due()
            .map(tokio::time::Instant::from_std);
        // Requests first: an answer of the proxy is worth more than one more push to it.
        let done = tokio::select! {
            biased;
            request = incoming.next() => match request {
                Some(Ok(request)) => handle(&server, &connection, &request, &out).await,
                Some(Err(status)) => {
                    debug!("ADS: {}: {status}", connection.id);
                    Err(Gone)
                }
                None => Err(Gone),
            },
            () = connection.wake.notified() => push(&server, &connection, &out).await,
            () = sleep_until(removals), if removals.is_some() => remove(&server, &connection, &out).await,
        };
        if done.is_err() {
            return;
        }
    }
}

/// The client has gone, or does not read any more.
struct Gone;

struct Registered<'a> {
    server: &'a Server,
    connection: &'a Connection,
}

impl Drop for Registered<'_> {
    fn drop(&mut self) {
        self.server.unregister(self.connection);
        info!("ADS: connection of {} has ended", self.connection.id);
    }
}

/// Waits for the first request that counts, which must say who asks; `None` when the client goes before.
///
/// A caller who has proven who it is gets the configuration of its own workloads, not of others.
async fn introduce(
    incoming: &mut Incoming,
    caller: Option<&Identity>,
) -> Result<Option<(Request, Arc<Node>)>, Status> {
    while let Some(Ok(request)) = incoming.next().await {
        if request.type_url == HEALTH_INFORMATION {
            continue;
        }
        let Some(node) = &request.node else {
            return Err(Status::invalid_argument(
                "the first request of a stream must carry a node",
            ));
        };
        let node = Node::parse(node).map_err(|e| Status::invalid_argument(e.to_string()))?;
        if let Some(caller) = caller {
            authorize(&node, caller)?;
        }
        return Ok(Some((request, Arc::new(node))));
    }
    Ok(None)
}

fn authorize(node: &Node, caller: &Identity) -> Result<(), Status> {
    let account = node.meta("SERVICE_ACCOUNT");
    if node.namespace != caller.namespace()
        || account.is_some_and(|a| a != caller.service_account())
    {
        return Err(Status::permission_denied(format!(
            "node {:?} of namespace {:?} and service account {:?} is not one of the caller, {caller}",
            node.id,
            node.namespace,
            account.unwrap_or_default()
        )));
    }
    Ok(())
}

async fn handle(
    server: &Arc<Server>,
    connection: &Connection,
    request: &Request,
    out: &Out,
) -> Result<(), Gone> {
    if request.type_url == HEALTH_INFORMATION {
        return Ok(());
    }
    if status::is_question(&request.type_url) {
        let answer = status::answer(server, connection, request).await;
        let refused = answer.is_err();
        if let Some(answer) = answer.transpose() {
            out.send(answer).await.map_err(|_| Gone)?;
        }
        return if refused { Err(Gone) } else { Ok(()) };
    }
    let Some(push) = server.current() else {
        return Err(Gone);
    };
    let answer = connection.request(server, &push, request);
    send(server, answer, out).await
}

async fn push(server: &Server, connection: &Connection, out: &Out) -> Result<(), Gone> {
    if connection.is_closed() {
        let _ = out
            .send(Err(Status::unavailable(
                "the control plane is shutting down",
            )))
            .await;
        return Err(Gone);
    }
    let answer = {
        let Ok(_turn) = server.throttle.acquire().await else {
            return Err(Gone);
        };
        let Some((since, marked)) = connection.take_mark() else {
            return Ok(());
        };
        server
            .metrics
            .time("pilot_proxy_queue_time", &[], marked.elapsed());
        let Some(push) = server.current() else {
            return Err(Gone);
        };
        let answer = connection.push(server, &push, Instant::now() + REMOVALS_WAIT);
        (answer, since)
    };
    let (answer, since) = answer;
    let any = !answer.responses.is_empty();
    send(server, answer, out).await?;
    if any {
        server
            .metrics
            .time("pilot_proxy_convergence_time", &[], since.elapsed());
    }
    Ok(())
}

async fn remove(server: &Server, connection: &Connection, out: &Out) -> Result<(), Gone> {
    let Some(push) = server.current() else {
        return Err(Gone);
    };
    let answer = connection.removals(server, &push);
    send(server, answer, out).await
}

async fn send(server: &Server, answer: Answer, out: &Out) -> Result<(), Gone> {
    for response in answer.responses {
        let started = Instant::now();
        out.send(Ok(response)).await.map_err(|_| Gone)?;
        server
            .metrics
            .time("pilot_xds_send_time", &[], started.elapsed());
    }
    Ok(())
}

/// How long what is gone stays, for a proxy that does not answer what replaces it.
const REMOVALS_WAIT: Duration = Duration::from_secs(2);
