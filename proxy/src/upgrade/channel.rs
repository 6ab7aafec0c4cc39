//! Sockets and lines over a pair of Unix sockets.

use std::{
    io::{self, IoSlice, IoSliceMut},
    mem::MaybeUninit,
    net::TcpListener,
    os::{
        fd::{AsFd, BorrowedFd, OwnedFd},
        unix::net::UnixStream,
    },
};

use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer, SendAncillaryMessage,
    SendFlags, recvmsg, sendmsg,
};

use super::{Offer, Socket};

/// Most descriptors in an offer: what settings allow, and more.
const MOST_SOCKETS: usize = 64;

/// Longest offer in bytes.
const MOST_BYTES: usize = 64 << 10;

/// Sends an offer with its sockets.
///
/// # Errors
/// The other side is gone, or there are too many sockets.
pub fn send(stream: &UnixStream, offer: &Offer, sockets: &[Socket]) -> io::Result<()> {
    let mut line = serde_json::to_vec(offer)?;
    line.push(b'\n');
    let descriptors: Vec<BorrowedFd<'_>> = sockets.iter().map(|socket| socket.socket.as_fd()).collect();
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MOST_SOCKETS))];
    let mut rights = SendAncillaryBuffer::new(&mut space);
    if !rights.push(SendAncillaryMessage::ScmRights(&descriptors)) {
        return Err(io::Error::other(format!("more than {MOST_SOCKETS} sockets")));
    }
    let sent = sendmsg(stream, &[IoSlice::new(&line)], &mut rights, SendFlags::NOSIGNAL)?;
    if sent == line.len() { Ok(()) } else { Err(io::Error::other("the offer was cut short")) }
}

/// Receives an offer and its sockets. Blocks until it is there.
///
/// # Errors
/// The other side is gone, or sent something else.
pub fn receive(stream: &UnixStream) -> io::Result<(Offer, Vec<Socket>)> {
    let (mut line, mut descriptors) = (Vec::new(), Vec::new());
    let mut bytes = vec![0; MOST_BYTES];
    while line.last() != Some(&b'\n') {
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MOST_SOCKETS))];
        let mut rights = RecvAncillaryBuffer::new(&mut space);
        let received =
            recvmsg(stream, &mut [IoSliceMut::new(&mut bytes)], &mut rights, RecvFlags::CMSG_CLOEXEC)?;
        for message in rights.drain() {
            if let RecvAncillaryMessage::ScmRights(more) = message {
                descriptors.extend(more);
            }
        }
        if received.bytes == 0 || line.len() > MOST_BYTES {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        line.extend_from_slice(bytes.get(..received.bytes).unwrap_or_default());
    }
    let offer: Offer = serde_json::from_slice(&line)?;
    if offer.sockets.len() != descriptors.len() {
        let text = format!("{} sockets were announced, {} came", offer.sockets.len(), descriptors.len());
        return Err(io::Error::other(text));
    }
    let with_place =
        |(place, descriptor): (_, OwnedFd)| Socket { place, socket: TcpListener::from(descriptor) };
    let sockets = offer.sockets.iter().cloned().zip(descriptors).map(with_place).collect();
    Ok((offer, sockets))
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use super::*;
    use crate::upgrade::Place;

    fn socket(name: &str) -> Socket {
        let socket = TcpListener::bind("127.0.0.1:0").expect("a free port");
        let address = socket.local_addr().expect("bound");
        Socket { place: Place { name: name.into(), listen: "127.0.0.1:0".into(), address }, socket }
    }

    #[test]
    fn sockets_arrive_with_their_places_and_still_listen() {
        let (ours, theirs) = UnixStream::pair().expect("a pair");
        let sent: Vec<_> = ["public", "private", "tls"].map(socket).into();
        let offer =
            Offer { pid: 7, has_tables: true, sockets: sent.iter().map(|s| s.place.clone()).collect() };
        send(&ours, &offer, &sent).expect("sent");
        drop(sent);
        let (received, sockets) = receive(&theirs).expect("received");
        assert_eq!(received, offer);
        for Socket { place, socket } in &sockets {
            assert_eq!(socket.local_addr().expect("bound"), place.address);
            std::net::TcpStream::connect(place.address).expect("nobody is refused");
        }
    }

    #[test]
    fn another_message_or_none_is_an_error() {
        let (ours, theirs) = UnixStream::pair().expect("a pair");
        drop(ours);
        receive(&theirs).expect_err("nobody is there");
        let (mut ours, theirs) = UnixStream::pair().expect("a pair");
        ours.write_all(b"hello\n").expect("written");
        receive(&theirs).expect_err("no offer");
        let (ours, theirs) = UnixStream::pair().expect("a pair");
        let lost = Offer { pid: 1, has_tables: false, sockets: vec![socket("public").place] };
        send(&ours, &lost, &[]).expect("sent");
        assert!(
            receive(&theirs).expect_err("none came").to_string().contains("1 sockets were announced, 0 came")
        );
    }
}
