//! Certificates of servers on this machine.

use std::{
    path::{Path, PathBuf},
    process::Command,
};

/// A certificate for 127.0.0.1 that no authority has signed, and its key, as PEM files.
#[derive(Debug)]
pub struct SelfSigned {
    /// Path of the certificate.
    pub certificate: PathBuf,
    /// Path of the private key.
    pub key: PathBuf,
}

impl SelfSigned {
    /// Creates both files in `dir` with openssl.
    #[track_caller]
    #[must_use]
    pub fn create(dir: &Path) -> Self {
        let (certificate, key) = (dir.join("cert.pem"), dir.join("key.pem"));
        let mut openssl = Command::new("openssl");
        openssl.args(["req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"]);
        openssl.args(["-days", "2", "-subj", "/CN=test", "-addext", "subjectAltName=IP:127.0.0.1"]);
        openssl.args(["-addext", "basicConstraints=critical,CA:FALSE", "-keyout"]).arg(&key);
        let made = openssl.arg("-out").arg(&certificate).output().expect("start openssl");
        assert!(made.status.success(), "{made:?}");
        Self { certificate, key }
    }
}
