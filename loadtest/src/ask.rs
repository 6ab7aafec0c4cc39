//! A question to a process on this machine: one GET, one answer.

use std::{net::SocketAddr, time::Duration};

use serde_json::Value;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
    time::timeout,
};

/// How long it may take.
const PATIENCE: Duration = Duration::from_secs(60);

/// The body of what `path` answers, whatever its status.
pub(crate) async fn get(address: SocketAddr, path: &str) -> Result<String, String> {
    let asked = async {
        let mut stream = TcpStream::connect(address).await?;
        let request = format!("GET {path} HTTP/1.1\r\nhost: p\r\nconnection: close\r\n\r\n");
        stream.write_all(request.as_bytes()).await?;
        let mut answer = Vec::new();
        stream.read_to_end(&mut answer).await?;
        std::io::Result::Ok(answer)
    };
    let answer = timeout(PATIENCE, asked).await;
    let answer = answer.map_err(|e| format!("{path}: {e}"))?.map_err(|e| format!("{path}: {e}"))?;
    let text = String::from_utf8_lossy(&answer);
    Ok(text.split_once("\r\n\r\n").map_or("", |(_, body)| body).to_owned())
}

/// The same as JSON.
pub(crate) async fn json(address: SocketAddr, path: &str) -> Result<Value, String> {
    serde_json::from_str(&get(address, path).await?).map_err(|e| format!("{path}: {e}"))
}
