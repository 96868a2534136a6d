//! The broker's side of SASL: PLAIN (RFC 4616) and SCRAM (RFC 5802, RFC 7677), for one user.

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD as BASE64;
use sha2::digest::core_api::BlockSizeUser;
use sha2::{Digest, Sha256, Sha512};

/// How often SCRAM hashes a password: the least that Kafka's brokers accept.
const ITERATIONS: u32 = 4096;

/// Who may come in, and how they say so.
#[derive(Clone, Debug)]
pub struct User {
    /// PLAIN, SCRAM-SHA-256 or SCRAM-SHA-512.
    pub mechanism: &'static str,
    /// Name, without `=` and `,`, which SCRAM writes otherwise.
    pub name: String,
    /// Password.
    pub password: String,
}

/// What follows from what a client said.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Step {
    /// This is to be answered, and more will come.
    Continue(Vec<u8>),
    /// This is to be answered, and the client is who it says it is.
    Admitted(Vec<u8>),
    /// The client is not.
    Refused,
}

/// One client's authentication.
pub(super) struct Exchange {
    user: User,
    salt: String,
    nonce: String,
    /// SCRAM's first two messages, once they were exchanged.
    begun: Option<String>,
}

impl Exchange {
    pub(super) fn new(user: &User) -> Self {
        let random = || -> [u8; 18] { std::array::from_fn(|_| fastrand::u8(..)) };
        Self::with(user, BASE64.encode(random()), BASE64.encode(random()))
    }

    fn with(user: &User, salt: String, nonce: String) -> Self {
        Self { user: user.clone(), salt, nonce, begun: None }
    }

    pub(super) fn step(&mut self, said: &[u8]) -> Step {
        let Ok(said) = std::str::from_utf8(said) else { return Step::Refused };
        let step = match self.user.mechanism {
            "PLAIN" => self.plain(said),
            "SCRAM-SHA-256" => self.scram::<Sha256>(said),
            "SCRAM-SHA-512" => self.scram::<Sha512>(said),
            _ => None,
        };
        step.unwrap_or(Step::Refused)
    }

    fn plain(&self, said: &str) -> Option<Step> {
        let (_on_behalf_of, rest) = said.split_once('\0')?;
        let (name, password) = rest.split_once('\0')?;
        (name == self.user.name && password == self.user.password).then(|| Step::Admitted(Vec::new()))
    }

    /// `None` for whatever is not as it should be.
    fn scram<D: Digest + BlockSizeUser + Clone>(&mut self, said: &str) -> Option<Step> {
        let Some(begun) = self.begun.take() else {
            let bare = said.strip_prefix("n,,")?;
            let (name, nonce) = bare.strip_prefix("n=")?.split_once(",r=")?;
            if name != self.user.name {
                return None;
            }
            self.nonce = format!("{nonce}{}", self.nonce);
            let first = format!("r={},s={},i={ITERATIONS}", self.nonce, self.salt);
            self.begun = Some(format!("{bare},{first}"));
            return Some(Step::Continue(first.into_bytes()));
        };
        let (without_proof, proof) = said.split_once(",p=")?;
        // "biws" is "n,," in base64: no channel binding.
        if without_proof != format!("c=biws,r={}", self.nonce) {
            return None;
        }
        let salted = salted_password::<D>(self.user.password.as_bytes(), &BASE64.decode(&self.salt).ok()?);
        let exchanged = format!("{begun},{without_proof}");
        let stored_key = D::digest(hmac::<D>(&salted, b"Client Key"));
        let signature = hmac::<D>(&stored_key, exchanged.as_bytes());
        let proof = BASE64.decode(proof).ok()?;
        let client_key: Vec<u8> = proof.iter().zip(&signature).map(|(proof, signature)| proof ^ signature).collect();
        if proof.len() != signature.len() || D::digest(client_key) != stored_key {
            return None;
        }
        // The broker proves in turn that it knows the password.
        let server_key = hmac::<D>(&salted, b"Server Key");
        let proof = BASE64.encode(hmac::<D>(&server_key, exchanged.as_bytes()));
        Some(Step::Admitted(format!("v={proof}").into_bytes()))
    }
}

/// PBKDF2 with one block, which RFC 5802 calls `Hi`.
fn salted_password<D: Digest + BlockSizeUser>(password: &[u8], salt: &[u8]) -> Vec<u8> {
    let mut last = hmac::<D>(password, &[salt, &1_u32.to_be_bytes()].concat());
    let mut salted = last.clone();
    for _ in 1..ITERATIONS {
        last = hmac::<D>(password, &last);
        salted.iter_mut().zip(&last).for_each(|(salted, last)| *salted ^= last);
    }
    salted
}

/// RFC 2104. The crate `hmac` in use elsewhere is for another version of `sha2`.
fn hmac<D: Digest + BlockSizeUser>(key: &[u8], text: &[u8]) -> Vec<u8> {
    let mut block = if key.len() > D::block_size() { D::digest(key).to_vec() } else { key.to_vec() };
    block.resize(D::block_size(), 0);
    let pad = |with: u8| block.iter().map(|byte| byte ^ with).collect::<Vec<u8>>();
    let inner = D::new().chain_update(pad(0x36)).chain_update(text).finalize();
    D::new().chain_update(pad(0x5c)).chain_update(inner).finalize().to_vec()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn user(mechanism: &'static str) -> User {
        User { mechanism, name: "user".to_owned(), password: "pencil".to_owned() }
    }

    /// The example of RFC 7677.
    #[test]
    fn scram_is_as_its_rfc_has_it() {
        let nonce = "%hvYDpWUa2RaTCAfuxFIlj)hNlF$k0".to_owned();
        let mut exchange = Exchange::with(&user("SCRAM-SHA-256"), "W22ZaJ0SNY7soEsUEjb6gQ==".to_owned(), nonce);
        let first = exchange.step(b"n,,n=user,r=rOprNGfwEbeRWgbNEkqO");
        let expected = "r=rOprNGfwEbeRWgbNEkqO%hvYDpWUa2RaTCAfuxFIlj)hNlF$k0,s=W22ZaJ0SNY7soEsUEjb6gQ==,i=4096";
        assert_eq!(first, Step::Continue(expected.as_bytes().to_vec()));
        let last = "c=biws,r=rOprNGfwEbeRWgbNEkqO%hvYDpWUa2RaTCAfuxFIlj)hNlF$k0,\
                    p=dHzbZapWIk4jUhN+Ute9ytag9zjfMHgsqmmiz7AndVQ=";
        let expected = b"v=6rriTRBi23WpRR/wtup+mMhUZUn/dB5nLTJRsjl95G4=";
        assert_eq!(exchange.step(last.as_bytes()), Step::Admitted(expected.to_vec()));
    }

    #[test]
    fn a_wrong_name_password_or_proof_is_refused() {
        for wrong in [&b"\0user\0pen"[..], b"\0me\0pencil", b"user pencil", b"\xff"] {
            assert_eq!(Exchange::new(&user("PLAIN")).step(wrong), Step::Refused);
        }
        assert_eq!(Exchange::new(&user("PLAIN")).step(b"\0user\0pencil"), Step::Admitted(Vec::new()));
        let mut exchange = Exchange::new(&user("SCRAM-SHA-512"));
        assert_eq!(exchange.step(b"n,,n=me,r=abc"), Step::Refused);
        assert!(matches!(exchange.step(b"n,,n=user,r=abc"), Step::Continue(_)));
        let last = format!("c=biws,r={},p=AAAA", exchange.nonce);
        assert_eq!(exchange.step(last.as_bytes()), Step::Refused);
    }
}
