//! Events written straight to a client's socket.
//!
//! Where a client speaks HTTP/1 in clear, an event is a chunk: its size, its bytes, a line end. Written through pingora's
//! session that is two allocations for the size, a buffered write, a flush and a timer; written here it is one system call on
//! bytes that are put together on the stack. The session is told nothing of it: what it must know of a chunked body is that it
//! goes on, and it writes the last chunk itself. Whatever a socket does not take at once is waited for here, too.

use std::{
    io::{self, IoSlice},
    time::Duration,
};

use http::Version;
use pingora_core::protocols::http::ServerSession;
use tokio::{net::TcpStream, time::timeout};

use crate::listener::connection::Connection;

/// Chunks up to this size, in bytes, are copied to be written in one piece; larger ones are written as they lie.
const COPIED_BYTES: usize = 1_024;

/// A chunk's size in hexadecimal and a line end, at most.
const MOST_SIZE_LINE: usize = 18;

/// The socket of a client whose body's chunks may be written past its session: HTTP/1.1 in clear, the head gone out.
pub fn socket(session: &ServerSession) -> Option<&TcpStream> {
    let session = session.as_http1()?;
    if session.req_header().version != Version::HTTP_11 {
        return None;
    }
    (**session.stream()).as_any().downcast_ref::<Connection>()?.clear_socket()
}

/// Writes `bytes`, not empty, as one chunk, if the socket takes any of it now: `Ok(n)` is how much of the chunk is still to be written
/// with [`rest`].
///
/// # Errors
/// The client is gone.
pub fn begin(socket: &TcpStream, bytes: &[u8]) -> io::Result<usize> {
    let mut line = [0; MOST_SIZE_LINE];
    let line = size_line(bytes.len(), &mut line);
    let length = line.len() + bytes.len() + 2;
    let mut copied = [0; COPIED_BYTES];
    let written = match copied.get_mut(..length) {
        Some(chunk) => {
            let (size, rest) = chunk.split_at_mut(line.len());
            let (body, end) = rest.split_at_mut(bytes.len());
            size.copy_from_slice(line);
            body.copy_from_slice(bytes);
            end.copy_from_slice(b"\r\n");
            socket.try_write(chunk)
        }
        None => socket.try_write_vectored(&[line, bytes, b"\r\n"].map(IoSlice::new)),
    };
    match written {
        Ok(0) => Err(io::ErrorKind::WriteZero.into()),
        Ok(written) => Ok(length - written),
        Err(e) if e.kind() == io::ErrorKind::WouldBlock => Ok(length),
        Err(e) => Err(e),
    }
}

/// Writes the last `left` bytes of the chunk that [`begin`] began, however long that takes, as long as some of it is taken within each
/// `stall`.
///
/// # Errors
/// The client is gone; [`io::ErrorKind::TimedOut`] if it took nothing for so long.
pub async fn rest(socket: &TcpStream, bytes: &[u8], mut left: usize, stall: Duration) -> io::Result<()> {
    let mut line = [0; MOST_SIZE_LINE];
    let line = size_line(bytes.len(), &mut line);
    let length = line.len() + bytes.len() + 2;
    while left > 0 {
        timeout(stall, socket.writable()).await.map_err(|_| io::Error::from(io::ErrorKind::TimedOut))??;
        let mut skip = length.saturating_sub(left);
        let slices = [line, bytes, b"\r\n"].map(|slice| {
            let skipped = skip.min(slice.len());
            skip -= skipped;
            IoSlice::new(slice.get(skipped..).unwrap_or_default())
        });
        match socket.try_write_vectored(&slices) {
            Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
            Ok(written) => left = left.saturating_sub(written),
            Err(e) if e.kind() == io::ErrorKind::WouldBlock => {}
            Err(e) => return Err(e),
        }
    }
    Ok(())
}

/// The line that begins a chunk of `length` bytes (RFC 9112, section 7.1).
fn size_line(length: usize, line: &mut [u8; MOST_SIZE_LINE]) -> &[u8] {
    let mut at = MOST_SIZE_LINE - 2;
    line[at..].copy_from_slice(b"\r\n");
    let mut left = length;
    loop {
        at -= 1;
        line[at] = b"0123456789abcdef"[left & 15];
        left >>= 4;
        if left == 0 {
            return &line[at..];
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use tokio::{io::AsyncReadExt, net::TcpListener};

    use super::*;

    proptest! {
        #[test]
        fn a_size_is_written_in_hexadecimal(length: usize) {
            let line = size_line(length, &mut [0; MOST_SIZE_LINE]).to_vec();
            prop_assert_eq!(line, format!("{length:x}\r\n").into_bytes());
        }
    }

    async fn pair() -> (TcpStream, TcpStream) {
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port");
        let client = TcpStream::connect(listener.local_addr().expect("bound")).await.expect("connected");
        (listener.accept().await.expect("accepted").0, client)
    }

    #[tokio::test]
    async fn chunks_of_any_size_arrive_whole_however_slowly_they_are_taken() {
        let (server, mut client) = pair().await;
        let sizes = [1, 10, 4_087, 4_096, 70_000, 9_000_000];
        let writing = async {
            for size in sizes {
                let bytes = vec![b'x'; size];
                let left = begin(&server, &bytes).expect("written");
                rest(&server, &bytes, left, Duration::from_secs(60)).await.expect("taken");
            }
        };
        let mut expected = Vec::new();
        for size in sizes {
            expected.extend_from_slice(format!("{size:x}\r\n{}\r\n", "x".repeat(size)).as_bytes());
        }
        let mut read = vec![0; expected.len()];
        let reading = async { client.read_exact(&mut read).await.expect("read") };
        tokio::join!(writing, reading);
        assert!(read == expected);
    }

    #[tokio::test]
    async fn a_client_that_takes_nothing_is_given_up_and_one_that_left_is_noticed() {
        let (server, client) = pair().await;
        let bytes = vec![b'x'; 64 << 20];
        let left = begin(&server, &bytes).expect("begun");
        let stalled = rest(&server, &bytes, left, Duration::from_millis(50)).await;
        assert_eq!(stalled.expect_err("stalled").kind(), io::ErrorKind::TimedOut);
        drop(client);
        assert!(rest(&server, &bytes, left, Duration::from_secs(60)).await.is_err());
    }
}
