//! What the program inside the test guest and the harness on the host have in common: the messages between them ([`protocol`]) and the
//! bytes of an ordered counter on a disk ([`record`]).

pub mod protocol;
pub mod record;
