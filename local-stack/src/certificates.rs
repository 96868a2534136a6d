//! Certificates for tests of encrypted connections, made anew each time by the command `openssl`: none can expire, and no
//! key lies in the repository.

use std::fs;
use std::path::PathBuf;
use std::process::Command;

use anyhow::{Context, Result};

use crate::process::run;
use crate::scratch::Scratch;

/// Kind of key: small, and quick to make.
const KEY: [&str; 4] = ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1"];
const DAYS: [&str; 2] = ["-days", "2"];

/// Somebody who issues certificates. The files are removed with it.
#[derive(Debug)]
pub struct Authority {
    scratch: Scratch,
}

/// A certificate and its key, as PEM files.
#[derive(Clone, Debug)]
pub struct Certificate {
    /// The certificate.
    pub certificate: PathBuf,
    /// Its private key, without a passphrase.
    pub key: PathBuf,
}

impl Authority {
    /// Makes an authority that nobody trusts yet.
    pub async fn create() -> Result<Self> {
        let authority = Self { scratch: Scratch::create()? };
        let mut make = authority.openssl("req");
        make.args(["-x509", "-nodes", "-subj", "/CN=test authority", "-keyout", "ca.key", "-out", "ca.pem"]);
        make.args(KEY).args(DAYS).args(["-addext", "keyUsage=critical,keyCertSign"]);
        run("openssl req", make).await.context("cannot make an authority: install openssl (Debian: openssl)")?;
        Ok(authority)
    }

    /// The authority's own certificate, for those who are to trust it.
    #[must_use]
    pub fn certificate(&self) -> PathBuf {
        self.file("ca.pem")
    }

    /// Issues a certificate for `subject`, as the Subject Alternative Name that OpenSSL writes `DNS:localhost` or
    /// `IP:127.0.0.1`.
    pub async fn issue(&self, subject: &str) -> Result<Certificate> {
        let name = subject.replace(|c: char| !c.is_ascii_alphanumeric(), "-");
        let [key, request, issued, extensions] =
            ["key", "csr", "pem", "ext"].map(|extension| format!("{name}.{extension}"));
        let mut ask = self.openssl("req");
        ask.args(["-nodes", "-subj", "/CN=issued", "-keyout", &key, "-out", &request]).args(KEY);
        run("openssl req", ask).await?;
        fs::write(self.file(&extensions), format!("subjectAltName={subject}\nbasicConstraints=CA:FALSE\n"))?;
        let mut sign = self.openssl("x509");
        sign.args(["-req", "-in", &request, "-CA", "ca.pem", "-CAkey", "ca.key", "-CAcreateserial", "-out", &issued]);
        sign.args(["-extfile", &extensions]).args(DAYS);
        run("openssl x509", sign).await?;
        Ok(Certificate { certificate: self.file(&issued), key: self.file(&key) })
    }

    fn openssl(&self, verb: &str) -> Command {
        let mut command = Command::new("openssl");
        command.arg(verb).current_dir(self.scratch.path());
        command
    }

    fn file(&self, name: &str) -> PathBuf {
        self.scratch.path().join(name)
    }
}
