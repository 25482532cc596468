//! Programs on connect(2) and sendmsg(2): give a verdict on calls before a packet exists. Only [`redirect`] rewrites addresses.
//!
//! [`Hook::Socket`] covers pods with their own network namespace, [`Hook::HostNetwork`] covers pods in the node's, and
//! [`Hook::NodeAllow`] covers all processes in the node's.

use aya_ebpf::{
    Global,
    bindings::bpf_sock_addr,
    helpers::generated::{bpf_get_current_cgroup_id, bpf_get_netns_cookie, bpf_set_retval},
    programs::SockAddrContext,
};
use imds_ebpf_common::{
    Address, CounterKey, Flow, Hook, Service, Subject, SubjectKind, Verdict, classify_address,
    event::RateLimitKey, opaque::opaque_xor, redirect::REDIRECTED_SERVICE,
};

use crate::{
    diagnostics, event_source, events, exempt, maps, netns, node_process, probe,
    redirect::{self, Listener},
};

/// 1 if `connect` and `sendmsg` programs may call `bpf_set_retval` (Linux 6.1). The loader sets it before loading. The
/// verifier treats it as a constant, and ignores the call as dead code if it is 0.
#[unsafe(no_mangle)]
static HAS_SET_RETVAL: Global<u8> = Global::new(0);

#[inline(always)]
pub(crate) fn classify_v4(ctx: &SockAddrContext, hook: Hook) -> Verdict {
    // SAFETY: the kernel passes a valid context, and the verifier checks the access.
    let destination = unsafe { (*ctx.sock_addr).user_ip4 };
    classify(ctx, hook, Address::from_ipv4(destination.to_ne_bytes()), unredirected)
}

/// Variant of [`classify_v4`] for connect(2) at [`Hook::Socket`], which redirects to the listener of a scoped exemption or of an
/// explained denial.
#[inline(always)]
pub(crate) fn connect_v4(ctx: &SockAddrContext) -> Verdict {
    // SAFETY: the kernel passes a valid context, and the verifier checks the access.
    let destination = unsafe { (*ctx.sock_addr).user_ip4 };
    let redirect = |cookie, address: &Address| redirect::connect_v4(ctx.sock_addr, cookie, address);
    let redirect = |cookie, call: (&Address, Service), verdict| redirected(cookie, call, verdict, redirect);
    classify(ctx, Hook::Socket, Address::from_ipv4(destination.to_ne_bytes()), redirect)
}

#[inline(always)]
pub(crate) fn classify_v6(ctx: &SockAddrContext, hook: Hook) -> Verdict {
    // SAFETY: the kernel passes a valid context, and the verifier checks the access.
    let words = unsafe { (*ctx.sock_addr).user_ip6 };
    classify(ctx, hook, address_of(words), unredirected)
}

/// Variant of [`classify_v6`] for connect(2) at [`Hook::Socket`], which redirects like [`connect_v4`].
#[inline(always)]
pub(crate) fn connect_v6(ctx: &SockAddrContext) -> Verdict {
    // SAFETY: the kernel passes a valid context, and the verifier checks the access.
    let words = unsafe { (*ctx.sock_addr).user_ip6 };
    let redirect = |cookie, address: &Address| redirect::connect_v6(ctx.sock_addr, cookie, address);
    let redirect = |cookie, call: (&Address, Service), verdict| redirected(cookie, call, verdict, redirect);
    classify(ctx, Hook::Socket, address_of(words), redirect)
}

/// Returns the canonical form of an IPv6 address in network byte order.
#[inline(always)]
fn address_of(words: [u32; 4]) -> Address {
    let mut octets = [0; 16];
    for (bytes, word) in octets.chunks_exact_mut(4).zip(words) {
        bytes.copy_from_slice(&word.to_ne_bytes());
    }
    Address::from_ipv6(octets)
}

/// Returns the verdict on a call: [`Verdict::Unrelated`] if another hook covers the socket's network namespace. `redirect` takes
/// the netns cookie, the destination and the verdict on it, and returns the outcome.
#[inline(always)]
fn classify(
    ctx: &SockAddrContext,
    hook: Hook,
    destination: Address,
    redirect: impl FnOnce(u64, (&Address, Service), Verdict) -> Outcome,
) -> Verdict {
    let service = service(ctx.sock_addr);
    let verdict = classify_address(destination, Some(service), &maps::Maps);
    match verdict {
        Verdict::Unrelated => return verdict,
        Verdict::Denied
        | Verdict::Audited
        | Verdict::Off
        | Verdict::Allowed
        | Verdict::Exempt
        | Verdict::Redirected => {}
    }
    // SAFETY: the helper takes the context of a socket address program.
    let cookie = unsafe { bpf_get_netns_cookie(ctx.sock_addr.cast()) };
    let is_host = matches!(hook, Hook::HostNetwork | Hook::NodeAllow);
    if netns::is_node(cookie) != is_host {
        return Verdict::Unrelated;
    }
    // In the node's namespace the cgroup identifies the container. In all others, the namespace identifies the pod.
    let (kind, id) = if is_host {
        // SAFETY: the helper takes no arguments; the caller is the current task.
        (SubjectKind::Cgroup, unsafe { bpf_get_current_cgroup_id() })
    } else {
        (SubjectKind::Netns, cookie)
    };
    let verdict = hide_bounds(verdict, cookie);
    if let Some(probed) = probe::classify(Subject::new(kind, id), hook, verdict) {
        return probed.verdict;
    }
    let verdict = exempt::apply(verdict, Subject::new(kind, id), &destination);
    let verdict = match hook {
        Hook::NodeAllow => node_process::apply_to_caller(hide_bounds(verdict, cookie)),
        Hook::FromPod | Hook::NodeEgress | Hook::Socket | Hook::HostNetwork | Hook::LocalService => verdict,
    };
    let Outcome { reported, applied } = redirect(cookie, (&destination, service), verdict);
    let _uncounted = maps::count(CounterKey::DELETED, hook, reported, 0);
    if matches!(applied, Verdict::Denied) {
        choose_errno();
    }
    let source = event_source::of_caller(id);
    let Some(limiter) = events::rate_limiter(&RateLimitKey::new(source, hook, reported)) else {
        diagnostics::warn_map_full(hook as u32);
        return applied;
    };
    let flow = Flow::to(destination.octets());
    let flow = Flow { destination_port: service.port, protocol: service.protocol, ..flow };
    // SAFETY: the rate limiter belongs to this CPU, and the map does not free it while the program that looked it up runs.
    events::report_call(hook, reported, cookie, flow, unsafe { &mut *limiter });
    applied
}

/// Verdicts on a call after a possible redirection. The verifier does not know their values.
struct Outcome {
    /// Verdict that is counted and reported.
    reported: Verdict,
    /// Verdict that decides whether the call passes. It differs for an explained denial, which passes to a listener.
    applied: Verdict,
}

/// Returns the outcome of a call that is not redirected.
#[inline(always)]
fn unredirected(cookie: u64, _call: (&Address, Service), verdict: Verdict) -> Outcome {
    let verdict = hide_bounds(verdict, cookie);
    Outcome { reported: verdict, applied: verdict }
}

/// Returns the outcome of a call after `redirect`, which takes the netns cookie and the endpoint of a denied call to
/// [`REDIRECTED_SERVICE`].
#[inline(always)]
fn redirected(
    cookie: u64,
    (destination, service): (&Address, Service),
    verdict: Verdict,
    redirect: impl FnOnce(u64, &Address) -> Listener,
) -> Outcome {
    let may_redirect = matches!(verdict, Verdict::Denied) && service == REDIRECTED_SERVICE;
    let listener = if may_redirect { redirect(cookie, destination) } else { Listener::NONE };
    let applied = if listener.is_some() { Verdict::Redirected } else { verdict };
    let reported = if listener.explains() { Verdict::Denied } else { applied };
    Outcome { reported: hide_bounds(reported, cookie), applied: hide_bounds(applied, cookie) }
}

/// Sets the error of the denied call, which is `EPERM` by default. Calls of `imds-agent verify` always fail with `EPERM`.
#[inline(always)]
fn choose_errno() {
    if HAS_SET_RETVAL.load() != 0 {
        // SAFETY: the helper takes a number, and the kernel ignores numbers that are not an error.
        let _kept = unsafe { bpf_set_retval(maps::denied_retval()) };
    }
}

/// Returns `verdict` unchanged and hides its value from the verifier, which then checks the code after it once, not once for
/// each verdict. `unknown` is any value that the verifier does not know.
#[inline(always)]
#[expect(clippy::cast_possible_truncation, reason = "the number of a verdict has 32 bits")]
fn hide_bounds(verdict: Verdict, unknown: u64) -> Verdict {
    let number = opaque_xor(verdict as u64, unknown) ^ unknown;
    // SAFETY: XOR with `unknown` twice gives the number of `verdict`.
    unsafe { Verdict::from_u32_unchecked(number as u32) }
}

/// Returns protocol and destination port of the call.
#[inline(always)]
#[expect(clippy::cast_possible_truncation, reason = "only the lower bits are needed, see below")]
fn service(call: *const bpf_sock_addr) -> Service {
    // SAFETY: the kernel passes a valid context, and the verifier checks the access.
    let protocol = unsafe { (*call).protocol };
    // SAFETY: the kernel passes a valid context, and the verifier checks the access.
    let port = unsafe { (*call).user_port };
    // Multipath TCP sockets have protocol 262 (TCP + 256), which the cast to `u8` turns into TCP. The first half of `user_port`
    // contains the port in network byte order (bpf_sock_addr, include/uapi/linux/bpf.h).
    Service::new(protocol as u8, u16::from_be(port as u16))
}
