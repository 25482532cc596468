//! Runs the BPF programs on packets without a network: `BPF_PROG_TEST_RUN`.

use std::{path::Path, time::Instant};

use aya::{
    Ebpf, EbpfLoader, Pod,
    maps::{Array, HashMap, MapData, PerCpuHashMap, RingBuf},
    programs::{Program, ProgramError, SchedClassifier, TestRun as _, TestRunOptions},
};

/// Programs of an object, loaded with their own maps and not attached.
#[derive(Debug)]
pub struct Object {
    ebpf: Ebpf,
}

impl Object {
    /// Loads every program of `object` without optional kernel features.
    pub fn load(object: &[u8]) -> Self {
        Self::load_with(object, &[])
    }

    /// Loads every program of `object` and sets some of its variables, by name.
    pub fn load_with(object: &[u8], variables: &[(&'static str, u8)]) -> Self {
        let mut loader = EbpfLoader::new();
        for (name, value) in variables {
            loader.override_global(name, value, true);
        }
        let mut ebpf = loader.load(object).expect("load the object");
        for (name, program) in ebpf.programs_mut() {
            let result = match program {
                Program::SchedClassifier(program) => program.load(),
                Program::CgroupSockAddr(program) => program.load(),
                Program::CgroupSkb(program) => program.load(),
                _ => panic!("{name} has a program type that the agent does not use"),
            };
            result.unwrap_or_else(|error| panic!("load {name}: {error}"));
        }
        Self { ebpf }
    }

    /// Returns the program with this name.
    pub fn program(&self, name: &str) -> &SchedClassifier {
        self.ebpf.program(name).expect("a program of this name").try_into().expect("a TC program")
    }

    /// Sets the only element of an array map.
    pub fn set<V: Pod>(&mut self, map: &str, value: V) {
        let mut map: Array<&mut MapData, V> =
            self.ebpf.map_mut(map).expect("a map of this name").try_into().expect("an array of this type");
        map.set(0, value, 0).expect("write the map");
    }

    /// Inserts an entry into a hash map.
    pub fn insert<K: Pod, V: Pod>(&mut self, map: &str, key: K, value: V) {
        let mut map: HashMap<&mut MapData, K, V> =
            self.ebpf.map_mut(map).expect("a map of this name").try_into().expect("a hash of this type");
        map.insert(key, value, 0).expect("write the map");
    }

    /// Returns the values of a key of a per-CPU hash, one per CPU. Returns an empty list if the key does not exist.
    pub fn per_cpu<K: Pod, V: Pod>(&self, map: &str, key: &K) -> Vec<V> {
        let map: PerCpuHashMap<&MapData, K, V> =
            self.ebpf.map(map).expect("a map of this name").try_into().expect("a per-CPU hash of this type");
        map.get(key, 0).map(|values| values.to_vec()).unwrap_or_default()
    }

    /// Returns the reader of a ring buffer.
    pub fn ring(&mut self, map: &str) -> RingBuf<&mut MapData> {
        self.ebpf.map_mut(map).expect("a map of this name").try_into().expect("a ring buffer")
    }

    /// Returns the number of instructions that the verifier processed for a program, if the kernel counts them.
    pub fn verified_instructions(&self, name: &str) -> Option<u32> {
        let program = self.ebpf.program(name).expect("a program of this name");
        let info = program.info().expect("describe a program");
        info.verified_instruction_count()
    }

    /// Returns the number of instructions of a program and the bytes of its JIT-compiled code, if the kernel reports
    /// them.
    pub fn sizes(&self, name: &str) -> [Option<u32>; 2] {
        let info =
            self.ebpf.program(name).expect("a program of this name").info().expect("describe a program");
        let compiled = Some(info.size_jitted()).filter(|&size| size > 0);
        // Each instruction has eight bytes (struct bpf_insn).
        [info.size_translated().map(|size| size / 8), compiled]
    }

    /// Returns the names of the programs, sorted.
    pub fn program_names(&self) -> Vec<String> {
        sorted(self.ebpf.programs().map(|(name, _)| name))
    }

    /// Returns the names of the maps, sorted, without those of constants and private variables.
    pub fn map_names(&self) -> Vec<String> {
        sorted(self.ebpf.maps().map(|(name, _)| name).filter(|name| ![".rodata", ".data"].contains(name)))
    }
}

fn sorted<'a>(names: impl Iterator<Item = &'a str>) -> Vec<String> {
    let mut names: Vec<_> = names.map(str::to_owned).collect();
    names.sort();
    names
}

/// Opens the pinned TC program at `path`.
pub fn pinned(path: &Path) -> SchedClassifier {
    SchedClassifier::from_pin(path).expect("open a pinned TC program")
}

/// Returns the action of the program for `packet`. Asserts that the program does not modify the packet.
pub fn action(program: &SchedClassifier, packet: &[u8]) -> i32 {
    try_action(program, packet).expect("the kernel takes this packet for a test run")
}

/// Returns the action of the program for `packet`. Returns `None` if the kernel rejects the packet for a test run: it
/// requires more than an Ethernet header, and newer kernels require a whole IP header if the EtherType is IP
/// (`bpf_prog_test_run_skb`).
pub fn try_action(program: &SchedClassifier, packet: &[u8]) -> Option<i32> {
    let (action, after) = try_run(program, packet)?;
    assert_eq!(after, packet, "the program changed the packet");
    Some(action)
}

/// Returns the action of the program for `packet` and the resulting packet. Returns `None` if the kernel rejects the
/// packet for a test run.
pub fn try_run(program: &SchedClassifier, packet: &[u8]) -> Option<(i32, Vec<u8>)> {
    let mut after = vec![0; packet.len() + 256];
    let options =
        TestRunOptions { data_in: Some(packet), data_out: Some(&mut after), ..TestRunOptions::default() };
    let result = match program.test_run(options) {
        Ok(result) => result,
        Err(ProgramError::SyscallError(error)) if error.io_error.raw_os_error() == Some(libc::EINVAL) => {
            return None;
        }
        Err(error) => panic!("BPF_PROG_TEST_RUN: {error}"),
    };
    after.truncate(result.data_size_out as usize);
    Some((result.return_value.cast_signed(), after))
}

/// Returns the action of the program and the resulting mark for a packet with this mark and ingress interface index.
/// Returns `None` if the kernel rejects an ingress interface for a test run.
pub fn marked(
    program: &SchedClassifier,
    packet: &[u8],
    mark: u32,
    ingress_ifindex: u32,
) -> Option<(i32, u32)> {
    // Fields of struct __sk_buff (include/uapi/linux/bpf.h). A test run accepts only a few of them.
    let (of_mark, of_ingress) = (8..12, 36..40);
    let mut before = [0; 192];
    before[of_mark.clone()].copy_from_slice(&mark.to_ne_bytes());
    before[of_ingress].copy_from_slice(&ingress_ifindex.to_ne_bytes());
    let mut after = before;
    let options = TestRunOptions {
        data_in: Some(packet),
        ctx_in: Some(&before),
        ctx_out: Some(&mut after),
        ..TestRunOptions::default()
    };
    let result = match program.test_run(options) {
        Ok(result) => result,
        Err(ProgramError::SyscallError(error)) if error.io_error.raw_os_error() == Some(libc::EINVAL) => {
            return None;
        }
        Err(error) => panic!("BPF_PROG_TEST_RUN: {error}"),
    };
    let mark = after[of_mark].try_into().expect("four bytes");
    Some((result.return_value.cast_signed(), u32::from_ne_bytes(mark)))
}

/// Returns the nanoseconds of one run, averaged over `repeat` runs. Measures the whole system call, because the kernel
/// reports whole nanoseconds, which are too coarse for one run.
pub fn nanoseconds(program: &SchedClassifier, packet: &[u8], repeat: u32) -> f64 {
    let options = TestRunOptions { data_in: Some(packet), repeat, ..TestRunOptions::default() };
    let start = Instant::now();
    program.test_run(options).expect("BPF_PROG_TEST_RUN");
    start.elapsed().as_secs_f64() * 1e9 / f64::from(repeat)
}
