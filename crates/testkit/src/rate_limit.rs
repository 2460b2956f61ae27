//! A rate limit service (`envoy.service.ratelimit.v3.RateLimitService`) that answers by a script.

use std::{
    collections::VecDeque,
    net::SocketAddr,
    sync::{Arc, Mutex},
};

use proto::envoy::service::ratelimit::v3::{
    RateLimitRequest, RateLimitResponse,
    rate_limit_service_server::{RateLimitService, RateLimitServiceServer},
};
use tokio::net::TcpListener;
use tokio_stream::wrappers::TcpListenerStream;
use tonic::{Request, Response, Status};

/// What it does with its next question.
#[derive(Debug, Clone)]
pub enum Act {
    /// Answers.
    Say(Box<RateLimitResponse>),
    /// Refuses to answer with this gRPC status.
    Fail(i32),
    /// Says nothing.
    Hang,
}

/// The service; it keeps what it was asked.
#[derive(Debug, Clone, Default)]
pub struct Service(Arc<Inner>);

#[derive(Debug, Default)]
struct Inner {
    script: Mutex<VecDeque<Act>>,
    seen: Mutex<Vec<RateLimitRequest>>,
}

impl Service {
    /// Begins to serve, in a task of the runtime that this is called in.
    pub async fn start(script: Vec<Act>) -> (Self, SocketAddr) {
        let service = Self::default();
        *service.0.script.lock().expect("nobody panics with it") = script.into();
        let listener = TcpListener::bind("127.0.0.1:0")
            .await
            .expect("a port is free");
        let address = listener.local_addr().expect("it is bound");
        let own = service.clone();
        tokio::spawn(
            tonic::transport::Server::builder()
                .add_service(RateLimitServiceServer::new(own))
                .serve_with_incoming(TcpListenerStream::new(listener)),
        );
        (service, address)
    }

    /// What it was asked.
    pub fn seen(&self) -> Vec<RateLimitRequest> {
        self.0.seen.lock().expect("nobody panics with it").clone()
    }
}

#[tonic::async_trait]
impl RateLimitService for Service {
    async fn should_rate_limit(
        &self,
        request: Request<RateLimitRequest>,
    ) -> Result<Response<RateLimitResponse>, Status> {
        let act = {
            let mut seen = self.0.seen.lock().expect("nobody panics with it");
            seen.push(request.into_inner());
            let mut script = self.0.script.lock().expect("nobody panics with it");
            script.pop_front()
        };
        match act {
            Some(Act::Say(answer)) => Ok(Response::new(*answer)),
            Some(Act::Fail(code)) => Err(Status::new(code.into(), "scripted")),
            Some(Act::Hang) => std::future::pending().await,
            None => Err(Status::unavailable("the script is over")),
        }
    }
}
