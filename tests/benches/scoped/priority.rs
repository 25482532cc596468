//! Scheduling priority of a process or thread.

/// Priority of the clients and the broker.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) enum Priority {
    Normal,
    /// Above all other processes (`SCHED_FIFO`).
    RealTime,
}

impl Priority {
    pub(crate) const fn name(self) -> &'static str {
        match self {
            Self::Normal => "normal",
            Self::RealTime => "real-time",
        }
    }

    /// Sets the priority of a process with one thread, or of the calling thread if the number is 0.
    pub(crate) fn set(self, pid: u32) {
        let (policy, priority) = match self {
            Self::Normal => (libc::SCHED_OTHER, 0),
            Self::RealTime => (libc::SCHED_FIFO, 1),
        };
        let parameters = libc::sched_param { sched_priority: priority };
        let pid = pid.try_into().expect("a process id");
        // SAFETY: the parameters outlive the call, which only reads them.
        let result = unsafe { libc::sched_setscheduler(pid, policy, &raw const parameters) };
        assert_eq!(result, 0, "sched_setscheduler: {}", std::io::Error::last_os_error());
    }
}
