//! One connection of the proxy, and what all of them share.

use std::collections::BTreeMap;
use std::io;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use bytes::{Bytes, BytesMut};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::tcp::{ReadHalf, WriteHalf};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;

use super::PgFault;
use super::conversation::{Conversation, Frame, Meaning};
use crate::background::accept;
use crate::orders::{Orders, Taken};

/// What a client may ask before its start-up message; both are refused with one letter.
const SSL_REQUEST: u32 = 80_877_103;
const GSS_REQUEST: u32 = 80_877_104;
const STARTUP_BYTES: usize = 10_000;
const READ_BYTES: usize = 16 * 1024;
/// A slow link passes a piece this often.
const PIECE: Duration = Duration::from_millis(50);

/// What the connections of one proxy share.
#[derive(Debug)]
pub(super) struct Shared {
    pub(super) orders: Orders<PgFault>,
    target: String,
    /// Changed when all connections are to be closed.
    cuts: watch::Sender<u64>,
    /// How often each statement was executed, by its text. There are as many as the client's code has.
    statements: Mutex<BTreeMap<String, u64>>,
}

impl Shared {
    pub(super) fn new(target: String, orders: Orders<PgFault>) -> Self {
        Self { orders, target, cuts: watch::Sender::new(0), statements: Mutex::default() }
    }

    pub(super) fn cut(&self) {
        self.cuts.send_modify(|cuts| *cuts += 1);
    }

    pub(super) fn statements(&self) -> MutexGuard<'_, BTreeMap<String, u64>> {
        self.statements.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What happens to the next bytes, whatever they are.
    fn take_for_bytes(&self) -> Option<Taken<PgFault>> {
        self.orders.take(|fault| !matches!(fault, PgFault::CutAfterCommit { .. } | PgFault::CutBeforeExecute { .. }))
    }

    /// What happens to a statement.
    fn take_for(&self, sql: &str) -> Option<Taken<PgFault>> {
        self.orders.take(|fault| match fault {
            PgFault::CutAfterCommit { matching } | PgFault::CutBeforeExecute { matching } => sql.contains(matching),
            _ => false,
        })
    }
}

/// Why a connection ends.
#[derive(Debug)]
enum End {
    /// One side closed it or broke, or it was cut on purpose.
    Closed,
    /// It is dead, and nobody is told.
    Swallowed(Taken<PgFault>),
}

impl From<io::Error> for End {
    fn from(_: io::Error) -> Self {
        Self::Closed
    }
}

/// A statement that waits for its commit.
#[derive(Debug, PartialEq)]
struct Armed {
    taken: Taken<PgFault>,
    sql: String,
}

type Talk = Mutex<Conversation<Armed>>;

fn lock(talk: &Talk) -> MutexGuard<'_, Conversation<Armed>> {
    talk.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Serves connections until dropped.
pub(super) async fn serve(listener: TcpListener, shared: Arc<Shared>) {
    loop {
        let near = accept("PostgreSQL proxy", &listener).await;
        tokio::spawn(connection(near, shared.clone()));
    }
}

async fn connection(mut near: TcpStream, shared: Arc<Shared>) {
    let mut cuts = shared.cuts.subscribe();
    let carried = async {
        let Ok(mut far) = TcpStream::connect(&shared.target).await else { return };
        if let Err(End::Swallowed(taken)) = carry(&mut near, &mut far, &shared).await {
            fall_silent(near, far, taken.until).await;
        }
    };
    let cut = async {
        // The sender is shared by all connections: it outlives this one.
        let _ = cuts.changed().await;
        // Within the branch, whose end closes the connection: who sees it closed sees it counted.
        shared.orders.hit(&PgFault::Cut, "all connections");
    };
    tokio::select! {
        () = cut => {}
        () = carried => {}
    }
}

async fn carry(near: &mut TcpStream, far: &mut TcpStream, shared: &Shared) -> Result<(), End> {
    far.set_nodelay(true)?;
    if !start_up(near, far, shared).await? {
        return Ok(());
    }
    let talk = Mutex::new(Conversation::new());
    let ((near_in, near_out), (far_in, far_out)) = (near.split(), far.split());
    let end = tokio::try_join!(to_server(near_in, far_out, shared, &talk), to_client(far_in, near_out, shared, &talk));
    for armed in lock(&talk).abandon() {
        shared.orders.restore(&armed.taken);
    }
    end.map(drop)
}

/// Carries the client's first messages, which have no type byte. `false` if the connection is for nothing else.
async fn start_up(near: &mut TcpStream, far: &mut TcpStream, shared: &Shared) -> Result<bool, End> {
    const CANCEL_REQUEST: u32 = 80_877_102;
    loop {
        let length = near.read_u32().await? as usize;
        if !(8..=STARTUP_BYTES).contains(&length) {
            return Err(End::Closed);
        }
        let mut rest = vec![0; length - 4];
        near.read_exact(&mut rest).await?;
        let code = u32::from_be_bytes(rest[..4].try_into().map_err(|_| End::Closed)?);
        if matches!(code, SSL_REQUEST | GSS_REQUEST) {
            near.write_all(b"N").await?;
            continue;
        }
        let message = [&u32::try_from(length).unwrap_or_default().to_be_bytes()[..], &rest].concat();
        pass(&message, &mut far.split().1, shared).await?;
        return Ok(code != CANCEL_REQUEST);
    }
}

async fn to_server(mut from: ReadHalf<'_>, mut to: WriteHalf<'_>, shared: &Shared, talk: &Talk) -> Result<(), End> {
    let mut buffer = BytesMut::new();
    loop {
        buffer.reserve(READ_BYTES);
        if from.read_buf(&mut buffer).await? == 0 {
            to.shutdown().await?;
            return Ok(());
        }
        let mut out = BytesMut::new();
        while let Some(frame) = Frame::take(&mut buffer)? {
            let executed = lock(talk).client(&frame);
            if let Some(sql) = &executed {
                *shared.statements().entry(sql.clone()).or_default() += 1;
            }
            let taken = executed.as_deref().and_then(|sql| shared.take_for(sql));
            if let (Some(sql), Some(taken)) = (executed, taken) {
                if matches!(taken.fault, PgFault::CutBeforeExecute { .. }) {
                    // What came before it still arrives, as it would.
                    pass(&out, &mut to, shared).await?;
                    shared.orders.hit(&taken.fault, sql);
                    return Err(End::Closed);
                }
                if let Some(again) = lock(talk).arm(Armed { taken, sql }) {
                    shared.orders.restore(&again.taken);
                }
            }
            out.extend_from_slice(frame.bytes());
        }
        pass(&out, &mut to, shared).await?;
    }
}

async fn to_client(mut from: ReadHalf<'_>, mut to: WriteHalf<'_>, shared: &Shared, talk: &Talk) -> Result<(), End> {
    let mut buffer = BytesMut::new();
    let mut held: Vec<Bytes> = Vec::new();
    loop {
        buffer.reserve(READ_BYTES);
        if from.read_buf(&mut buffer).await? == 0 {
            to.shutdown().await?;
            return Ok(());
        }
        let mut out = BytesMut::new();
        while let Some(frame) = Frame::take(&mut buffer)? {
            let meaning = lock(talk).server(&frame);
            match meaning {
                Meaning::Pass => {}
                Meaning::Hold => {
                    held.push(frame.bytes().clone());
                    continue;
                }
                Meaning::Committed(armed) => {
                    shared.orders.hit(&armed.taken.fault, armed.sql);
                    return Err(End::Closed);
                }
                Meaning::Undone(armed) => {
                    shared.orders.restore(&armed.taken);
                    held.drain(..).for_each(|bytes| out.extend_from_slice(&bytes));
                }
                Meaning::Release => held.drain(..).for_each(|bytes| out.extend_from_slice(&bytes)),
            }
            out.extend_from_slice(frame.bytes());
        }
        pass(&out, &mut to, shared).await?;
    }
}

/// Writes bytes, or does with them what was ordered.
async fn pass(bytes: &[u8], to: &mut WriteHalf<'_>, shared: &Shared) -> Result<(), End> {
    if bytes.is_empty() {
        return Ok(());
    }
    if let Some(taken) = shared.take_for_bytes() {
        shared.orders.hit(&taken.fault, format!("{} bytes", bytes.len()));
        match taken.fault {
            PgFault::Cut => return Err(End::Closed),
            PgFault::Swallow => return Err(End::Swallowed(taken)),
            PgFault::Delay(milliseconds) => tokio::time::sleep(Duration::from_millis(milliseconds)).await,
            PgFault::Throttle(bytes_per_second) => {
                let bytes_per_second = bytes_per_second.max(1);
                let most = bytes_per_second.saturating_mul(PIECE.as_millis() as u64) / 1_000;
                for piece in bytes.chunks(usize::try_from(most).unwrap_or(usize::MAX).max(1)) {
                    to.write_all(piece).await?;
                    tokio::time::sleep(Duration::from_secs_f64(piece.len() as f64 / bytes_per_second as f64)).await;
                }
                return Ok(());
            }
            // Those of statements are not taken here.
            PgFault::CutAfterCommit { .. } | PgFault::CutBeforeExecute { .. } => {}
        }
    }
    Ok(to.write_all(bytes).await?)
}

/// Keeps both sides of a dead connection open and passes nothing, the end of the client's side included.
async fn fall_silent(mut near: TcpStream, far: TcpStream, until: Option<Instant>) {
    let client_gone = async {
        let mut sink = [0; 1_024];
        while near.read(&mut sink).await.is_ok_and(|length| length > 0) {}
    };
    match until {
        None => client_gone.await,
        // The server's side ends with the time; the client's when the client gives up.
        Some(until) => {
            let server_released = async {
                tokio::time::sleep_until(until.into()).await;
                drop(far);
            };
            tokio::join!(client_gone, server_released);
        }
    }
}
