//! Confinement of this process by Linux security modules, for messages about denied operations.

use std::{fs, io};

/// Files with the AppArmor profile of a process: of Linux 5.8 and newer, and of older kernels.
const APPARMOR: [&str; 2] = ["/proc/self/attr/apparmor/current", "/proc/self/attr/current"];
const APPARMOR_ENABLED: &str = "/sys/module/apparmor/parameters/enabled";
/// Contains 1 if SELinux denies what its policy does not allow.
const SELINUX_ENFORCE: &str = "/sys/fs/selinux/enforce";
const SELINUX: &str = "/proc/self/attr/current";
const LOCKDOWN: &str = "/sys/kernel/security/lockdown";

/// Security module that confines this process, with the name of the profile or context.
#[derive(Clone, Debug, Eq, PartialEq)]
pub(crate) enum Confinement {
    /// Profile, such as `docker-default (enforce)`.
    AppArmor(String),
    /// Context, such as `system_u:system_r:container_t:s0`.
    SeLinux(String),
}

impl Confinement {
    /// Returns the confinement of this process; `None` if no security module is known to confine it.
    pub(crate) fn of_this_process() -> Option<Self> {
        let read = |path: &str| fs::read_to_string(path).ok();
        if read(APPARMOR_ENABLED).is_some_and(|enabled| enabled.trim() == "Y") {
            return profile(&APPARMOR.into_iter().find_map(read)?).map(Self::AppArmor);
        }
        // The policy may deny even this file, which only an enforced policy does.
        let enforces = match fs::read_to_string(SELINUX_ENFORCE) {
            Ok(enforce) => enforce.trim() == "1",
            Err(error) => error.kind() == io::ErrorKind::PermissionDenied,
        };
        context(&enforces.then(|| read(SELINUX)).flatten()?).map(Self::SeLinux)
    }

    /// Describes the confinement, such as `AppArmor profile docker-default (enforce)`.
    pub(crate) fn describe(&self) -> String {
        match self {
            Self::AppArmor(profile) => format!("AppArmor profile {profile}"),
            Self::SeLinux(context) => format!("SELinux context {context}"),
        }
    }

    /// Reports whether the security module denies operations with this error. SELinux denies capabilities with EPERM
    /// (`cred_has_capability`, security/selinux/hooks.c).
    const fn denies_with(&self, errno: i32) -> bool {
        match self {
            Self::AppArmor(_) => errno == libc::EACCES,
            Self::SeLinux(_) => matches!(errno, libc::EACCES | libc::EPERM),
        }
    }

    /// Returns the remedy for an operation that the security module denies.
    pub(crate) const fn remedy(&self) -> &'static str {
        match self {
            Self::AppArmor(_) => "run the agent unconfined, or with the profile of deploy/apparmor",
            Self::SeLinux(_) => "see `ausearch -m avc`; run the container with the SELinux type spc_t",
        }
    }
}

/// Explains an operation that the security module denied: names the module that confines this process, and the remedy. `None` if
/// no module confines it, or the error is another one.
pub(crate) fn explain(error: &io::Error) -> Option<String> {
    let errno = error.raw_os_error().filter(|errno| [libc::EACCES, libc::EPERM].contains(errno))?;
    let confinement = Confinement::of_this_process().filter(|confinement| confinement.denies_with(errno))?;
    Some(format!("{} confines this process: {}", confinement.describe(), confinement.remedy()))
}

/// Returns the lockdown mode of the kernel; `None` if there is none, or securityfs is not mounted.
pub(crate) fn lockdown() -> Option<String> {
    let modes = fs::read_to_string(LOCKDOWN).ok()?;
    let (_, rest) = modes.split_once('[')?;
    rest.split_once(']').map(|(mode, _)| mode.to_owned()).filter(|mode| mode != "none")
}

/// Returns the name of a profile in the kernel's format, unless the process is not confined or complains only. Ubuntu has
/// profiles without rules, such as `runc (unconfined)`, which a container without a profile inherits from its runtime.
fn profile(current: &str) -> Option<String> {
    let current = clean(current);
    let is_free = |mode| current.ends_with(mode);
    let is_enforced = !current.is_empty()
        && current != "unconfined"
        && ![" (complain)", " (unconfined)"].iter().any(is_free);
    is_enforced.then_some(current)
}

/// Returns a context unless its type is one of those that the reference policy and container-selinux do not confine.
fn context(current: &str) -> Option<String> {
    let current = clean(current);
    let domain = current.split(':').nth(2).unwrap_or_default();
    let is_confined = !current.is_empty() && domain != "spc_t" && !domain.starts_with("unconfined_");
    is_confined.then_some(current)
}

fn clean(text: &str) -> String {
    text.trim_matches(['\0', '\n', ' ']).to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn enforced_profiles_confine() {
        assert_eq!(profile("docker-default (enforce)\n"), Some("docker-default (enforce)".to_owned()));
        for none in ["unconfined\n", "imds-agent (complain)\n", "runc (unconfined)\n", "", "\0"] {
            assert_eq!(profile(none), None, "{none:?}");
        }
    }

    #[test]
    fn selinux_denies_capabilities() {
        let [apparmor, selinux] =
            [Confinement::AppArmor, Confinement::SeLinux].map(|kind| kind("a".to_owned()));
        assert!(apparmor.denies_with(libc::EACCES) && !apparmor.denies_with(libc::EPERM));
        assert!(selinux.denies_with(libc::EACCES) && selinux.denies_with(libc::EPERM));
        assert!(!selinux.denies_with(libc::ENOENT));
    }

    #[test]
    fn types_with_all_permissions_do_not_confine() {
        let container = "system_u:system_r:container_t:s0:c1,c2";
        assert_eq!(context(&format!("{container}\0")), Some(container.to_owned()));
        for none in [
            "system_u:system_r:spc_t:s0",
            "unconfined_u:unconfined_r:unconfined_t:s0-s0:c0.c1023",
            "system_u:system_r:unconfined_service_t:s0",
            "",
        ] {
            assert_eq!(context(none), None, "{none:?}");
        }
    }
}
