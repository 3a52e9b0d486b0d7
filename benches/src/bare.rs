//! The least that a server can do to sign: it reads a request, signs with AWS-LC, and answers. What it takes longer than that is
//! not its own doing, but the machine's, and that of the load beside it.

use std::net::SocketAddr;
use std::process::Command;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};

use crate::daemon::{body, token};
use crate::load::{Request, is_complete};
use crate::peers::Loop;
use crate::process::{Server, free_address};

/// The first argument of the process that serves.
pub const ARGUMENT: &str = "bare";

/// A server of one thread that answers whatever it is asked with a signature over the bytes of a token of ours, and with as many
/// bytes as ours has.
pub struct Bare {
    _server: Server,
    address: SocketAddr,
}

impl Bare {
    /// `answer` is one of ours to a sign request.
    pub fn answering_like(answer: &str) -> Self {
        let address = free_address();
        let this = std::env::current_exe().unwrap();
        let mut command = Command::new(this);
        command.arg(ARGUMENT).arg(address.to_string()).arg(token(answer)).arg(body(answer).len().to_string());
        Bare { _server: Server::start(command, address), address }
    }

    /// The request that jwksd gets, sent here.
    pub fn sign(&self, ours: &Request) -> Request {
        ours.to(self.address)
    }
}

/// Serves, if the process was started for it.
pub fn serve_if_asked() {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let [argument, address, token, length] = &arguments[..] else { return };
    if argument != ARGUMENT {
        return;
    }
    let message = token.rsplit_once('.').unwrap().0.as_bytes();
    let answer =
        format!("HTTP/1.1 200 OK\r\ncontent-length: {length}\r\n\r\n{:1$}", "", length.parse::<usize>().unwrap());
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    runtime.block_on(tokio::task::LocalSet::new().run_until(async {
        let listener = TcpListener::bind(address).await.unwrap();
        loop {
            let (stream, _) = listener.accept().await.unwrap();
            stream.set_nodelay(true).unwrap();
            tokio::task::spawn_local(serve(stream, message.to_vec(), answer.clone().into_bytes()));
        }
    }));
    std::process::exit(0);
}

async fn serve(mut stream: TcpStream, message: Vec<u8>, answer: Vec<u8>) {
    let mut signing = Loop::of("ES256");
    let (mut buffer, mut filled) = (vec![0; 64 * 1024], 0);
    loop {
        match stream.read(&mut buffer[filled..]).await {
            Ok(read) if read > 0 => filled += read,
            _ => return,
        }
        if is_complete(&buffer[..filled]) {
            filled = 0;
            signing.sign(&message);
            if stream.write_all(&answer).await.is_err() {
                return;
            }
        }
    }
}
