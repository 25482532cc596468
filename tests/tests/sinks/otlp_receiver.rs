//! A receiver of OTLP/HTTP that answers as the test says.

use std::{
    collections::VecDeque,
    io::{BufRead as _, BufReader, Read as _, Write as _},
    net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream},
    sync::{Arc, Mutex, mpsc},
    thread,
};

use imds_tests::{TestEnv, poll::poll_until, probe::LONG};
use serde_json::Value;

/// Answer to one request.
pub(crate) enum Answer {
    /// Status line, headers that each end in CRLF, and body.
    Response(&'static str, &'static str, &'static str),
    /// No answer, as long as the client waits.
    Silence,
}

/// Request with its header lines and its body.
pub(crate) struct Received {
    pub(crate) target: String,
    pub(crate) headers: Vec<String>,
    pub(crate) body: Value,
}

/// A running receiver. The threads end with the process.
pub(crate) struct OtlpReceiver {
    pub(crate) address: SocketAddr,
    requests: mpsc::Receiver<Received>,
}

impl OtlpReceiver {
    /// Starts a receiver on the node's loopback. Answers the first requests with `answers`, and later ones with success.
    pub(crate) fn start(env: &TestEnv, port: u16, answers: Vec<Answer>) -> Self {
        let listener = env.node.run(|| TcpListener::bind((Ipv4Addr::LOCALHOST, port))).unwrap();
        let address = listener.local_addr().unwrap();
        let (sender, requests) = mpsc::channel();
        let answers = Arc::new(Mutex::new(VecDeque::from(answers)));
        thread::spawn(move || {
            for stream in listener.incoming().map_while(Result::ok) {
                let (sender, answers) = (sender.clone(), Arc::clone(&answers));
                thread::spawn(move || serve(&stream, &sender, &answers));
            }
        });
        Self { address, requests }
    }

    pub(crate) fn url(&self) -> String {
        format!("http://{}/v1/logs", self.address)
    }

    /// Returns the next request, which must arrive within the time limit.
    #[track_caller]
    pub(crate) fn next(&self) -> Received {
        poll_until(LONG, "a request", || self.requests.try_recv().ok())
    }
}

impl Received {
    /// Returns the log records.
    pub(crate) fn logs(&self) -> &[Value] {
        self.body["resourceLogs"][0]["scopeLogs"][0]["logRecords"].as_array().unwrap()
    }

    /// Returns the source ports of the log records.
    pub(crate) fn ports(&self) -> Vec<u16> {
        let port = |log: &Value| attribute(&log["attributes"], "source.port").unwrap().parse().unwrap();
        self.logs().iter().map(port).collect()
    }

    pub(crate) fn has_header(&self, line: &str) -> bool {
        self.headers.iter().any(|header| header.eq_ignore_ascii_case(line))
    }
}

/// Returns the text of an attribute.
pub(crate) fn attribute(attributes: &Value, key: &str) -> Option<String> {
    let found = attributes.as_array().unwrap().iter().find(|attribute| attribute["key"] == key)?;
    let value = &found["value"];
    Some(value["stringValue"].as_str().or(value["intValue"].as_str()).unwrap().to_owned())
}

fn serve(
    mut stream: &TcpStream,
    sender: &mpsc::Sender<Received>,
    answers: &Mutex<VecDeque<Answer>>,
) -> Option<()> {
    let mut reader = BufReader::new(stream);
    loop {
        let mut lines = reader.by_ref().lines();
        let request = lines.next()?.ok()?;
        let headers: Vec<_> = lines.map_while(Result::ok).take_while(|line| !line.is_empty()).collect();
        let length = headers.iter().find_map(|header| {
            let (name, value) = header.split_once(": ")?;
            name.eq_ignore_ascii_case("content-length").then(|| value.parse().ok())?
        });
        let mut body = vec![0; length.expect("a length")];
        reader.read_exact(&mut body).ok()?;
        let target = request.split(' ').nth(1)?.to_owned();
        assert!(request.starts_with("POST "), "{request}");
        let body = serde_json::from_slice(&body).expect("JSON");
        let answer = answers.lock().unwrap().pop_front();
        sender.send(Received { target, headers, body }).ok()?;
        let (status, headers, body) = match answer {
            Some(Answer::Silence) => {
                // Returns once the client closes the connection.
                let _end = reader.read(&mut [0]);
                return None;
            }
            Some(Answer::Response(status, headers, body)) => (status, headers, body),
            None => ("200 OK", "", "{}"),
        };
        let length = body.len();
        write!(stream, "HTTP/1.1 {status}\r\n{headers}Content-Length: {length}\r\n\r\n{body}").ok()?;
    }
}
