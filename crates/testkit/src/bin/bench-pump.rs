//! The floor of every comparison: accepts, connects, and carries bytes both ways without looking at them.
//!
//!     bench-pump LISTEN UPSTREAM

use std::net::SocketAddr;

use anyhow::Context;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{
        TcpListener, TcpStream,
        tcp::{OwnedReadHalf, OwnedWriteHalf},
    },
    task::LocalSet,
};

fn main() -> anyhow::Result<()> {
    let mut args = std::env::args().skip(1);
    let mut address = || -> anyhow::Result<SocketAddr> {
        args.next()
            .context("usage: bench-pump LISTEN UPSTREAM")?
            .parse()
            .context("not IP:PORT")
    };
    let (listen, upstream) = (address()?, address()?);
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()?;
    LocalSet::new().block_on(&runtime, async move {
        let listener = TcpListener::bind(listen)
            .await
            .with_context(|| listen.to_string())?;
        loop {
            let (client, _) = listener.accept().await?;
            tokio::task::spawn_local(async move {
                let Ok(server) = TcpStream::connect(upstream).await else {
                    return;
                };
                // Options that cannot be set only cost latency.
                let _ = (client.set_nodelay(true), server.set_nodelay(true));
                let (client_read, client_write) = client.into_split();
                let (server_read, server_write) = server.into_split();
                tokio::task::spawn_local(carry(server_read, client_write));
                carry(client_read, server_write).await;
            });
        }
    })
}

async fn carry(mut from: OwnedReadHalf, mut to: OwnedWriteHalf) {
    let mut buffer = vec![0; 64 << 10];
    while let Ok(n) = from.read(&mut buffer).await {
        if n == 0 || to.write_all(&buffer[..n]).await.is_err() {
            break;
        }
    }
    let _ = to.shutdown().await;
}
