//! `pc match`: where a call would end, by the proxy's own matching.

use std::net::{IpAddr, SocketAddr};

use clap::{Args, ValueEnum};
use proxy::plan::call::{Call, Configuration, End, Mode, Protocol, Security};

use super::{Common, Output, print_value};

/// The call to be explained.
#[derive(Debug, Args)]
pub(super) struct Match {
    #[command(flatten)]
    common: Common,
    /// How the call reaches the proxy.
    #[arg(long, value_enum, default_value_t = ModeArgument::Outbound)]
    mode: ModeArgument,
    /// Address that the client connects to.
    #[arg(long)]
    address: IpAddr,
    /// Port that the client connects to.
    #[arg(long)]
    port: u16,
    /// What the client speaks.
    #[arg(long, value_enum, default_value_t = ProtocolArgument::Http)]
    protocol: ProtocolArgument,
    /// What it is wrapped in; mtls presents a mesh certificate.
    #[arg(long, value_enum, default_value_t = TlsArgument::Plaintext)]
    tls: TlsArgument,
    /// Server name of the ClientHello.
    #[arg(long, default_value = "")]
    sni: String,
    /// Protocols of the ClientHello, in order, separated by commas.
    #[arg(long, default_value = "")]
    alpn: String,
    /// Host header; the address where none is given.
    #[arg(long)]
    host: Option<String>,
    /// Path with its query.
    #[arg(long, default_value = "/")]
    path: String,
    /// A further request header, NAME:VALUE; `:method:POST` sets the method. Can be repeated.
    #[arg(long = "header", value_name = "NAME:VALUE", value_parser = header)]
    headers: Vec<(String, String)>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum ModeArgument {
    /// From the application, through 15001.
    Outbound,
    /// To the application, through 15006.
    Inbound,
    /// Straight to a port of a gateway.
    Gateway,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum ProtocolArgument {
    Http,
    Http2,
    Tcp,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum TlsArgument {
    Plaintext,
    Tls,
    Mtls,
}

/// `NAME:VALUE`; a pseudo header begins with its own colon.
fn header(text: &str) -> Result<(String, String), String> {
    let name_end = text
        .char_indices()
        .skip(1)
        .find(|(_, c)| *c == ':')
        .map(|(at, _)| at)
        .ok_or_else(|| format!("`{text}` is not NAME:VALUE"))?;
    let (name, value) = text.split_at(name_end);
    Ok((
        name.trim().to_ascii_lowercase(),
        value[1..].trim().to_owned(),
    ))
}

pub(super) fn run(arguments: Match) -> anyhow::Result<()> {
    let dump = arguments.common.dump()?.raw();
    let configuration = Configuration::from_dump(&dump).map_err(anyhow::Error::msg)?;
    for line in &configuration.left_out {
        eprintln!("note: left out of this explanation: {line}");
    }
    let end = configuration.end_of(&arguments.call());
    match arguments.common.output {
        Output::Short => print!("{}", table(&end)),
        output => print_value(&end.to_json(), output),
    }
    Ok(())
}

impl Match {
    fn call(&self) -> Call {
        Call {
            mode: match self.mode {
                ModeArgument::Outbound => Mode::Outbound,
                ModeArgument::Inbound => Mode::Inbound,
                ModeArgument::Gateway => Mode::Gateway,
            },
            destination: SocketAddr::new(self.address, self.port),
            protocol: match self.protocol {
                ProtocolArgument::Http => Protocol::Http,
                ProtocolArgument::Http2 => Protocol::Http2,
                ProtocolArgument::Tcp => Protocol::Tcp,
            },
            security: match self.tls {
                TlsArgument::Plaintext => Security::Plaintext,
                TlsArgument::Tls => Security::Tls,
                TlsArgument::Mtls => Security::Mtls,
            },
            sni: self.sni.clone(),
            alpn: self
                .alpn
                .split(',')
                .filter(|a| !a.is_empty())
                .map(ToOwned::to_owned)
                .collect(),
            host: self
                .host
                .clone()
                .unwrap_or_else(|| self.address.to_string()),
            path: self.path.clone(),
            headers: self.headers.clone(),
        }
    }
}

fn table(end: &End) -> String {
    let mut rows: Vec<(&str, String)> = end
        .steps()
        .map(|(name, value)| (name, value.to_owned()))
        .collect();
    for (name, weight) in &end.weighted_clusters {
        rows.push(("cluster", format!("{name} (weight {weight})")));
    }
    rows.iter()
        .map(|(name, value)| format!("{name:<13} {value}\n"))
        .collect()
}

#[cfg(test)]
mod tests {
    use super::header;

    #[test]
    fn a_header_is_a_name_and_a_value() {
        let pair = |name: &str, value: &str| Ok((name.to_owned(), value.to_owned()));
        assert_eq!(header("X-User: jason"), pair("x-user", "jason"));
        assert_eq!(header(":method:POST"), pair(":method", "POST"));
        assert_eq!(header("a:b:c"), pair("a", "b:c"));
        assert!(header("x-user").is_err());
    }
}
