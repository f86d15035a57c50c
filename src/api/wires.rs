//! The wires: the protocols over which gateways ask for decisions. A wire is one file in `wires/` and one line in [`WIRES`].
//!
//! A wire converts its messages to a [`DecisionRequest`], asks the service of its runtime, and converts the answer. It decides nothing.
//! Look next at `wires/portcullis_v1.rs`, the project's own protocol, and at `service/request.rs`.
//!
//! [`DecisionRequest`]: crate::service::request::DecisionRequest

pub(super) mod portcullis_v1;

use tonic::service::Routes;

use super::message_limits::{MessageLimits, small_message_limits};
use super::noop;
use crate::service::RuntimeService;

/// Every wire.
const WIRES: &[Wire] = &[portcullis_v1::WIRE];

/// One protocol over which gateways ask for decisions.
struct Wire {
    /// The full names of its gRPC services. Health checks report them.
    services: &'static [&'static str],
    /// Adds its services to the routes of a runtime. They answer with the service of that runtime.
    add_services: fn(Routes, &RuntimeService) -> Routes,
    /// The limits on the messages of a method; `None` for a method of something else.
    message_limits: fn(&str) -> Option<MessageLimits>,
}

/// Adds the services of every wire to the routes of a runtime.
pub fn add_wires(routes: Routes, service: &RuntimeService) -> Routes {
    WIRES.iter().fold(routes, |routes, wire| (wire.add_services)(routes, service))
}

/// The full names of the gRPC services of every wire.
pub fn wire_services() -> impl Iterator<Item = &'static str> {
    WIRES.iter().flat_map(|wire| wire.services).copied()
}

/// The limits of a method on the decisions' listener.
pub fn decision_limits(path: &str) -> MessageLimits {
    let of_wire = WIRES.iter().find_map(|wire| (wire.message_limits)(path));
    of_wire.or_else(|| noop::message_limits(path)).unwrap_or_else(|| small_message_limits(path))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_method_has_its_limits() {
        const KIB: usize = 1024;
        let check = |path: &str, bytes_max: usize, is_stream: bool| {
            let limits = decision_limits(path);
            assert_eq!((limits.bytes_max, limits.is_stream, limits.arrival.as_secs()), (bytes_max, is_stream, 5), "{path}");
        };
        check("/portcullis.v1.DecisionService/Check", 256 * KIB, false);
        check("/portcullis.v1.DecisionService/Explain", 256 * KIB, false);
        check("/portcullis.v1.DecisionService/ListTools", 256 * KIB, false);
        check("/portcullis.v1.DecisionService/CheckBatch", 4096 * KIB, false);
        check("/portcullis.v1.DecisionService/CheckStream", 256 * KIB, true);
        check("/portcullis.v1.NoopService/Noop", 256 * KIB, false);
        check("/portcullis.v1.RevocationService/Watch", 8 * KIB, false);
        check("/portcullis.v1.PolicyService/Apply", 8 * KIB, false);
        check("/grpc.health.v1.Health/Check", 8 * KIB, false);
        check("/grpc.reflection.v1.ServerReflection/ServerReflectionInfo", 8 * KIB, true);
        check("", 8 * KIB, false);
    }
}
