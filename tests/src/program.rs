//! The BPF programs on packets that no network carried: `BPF_PROG_TEST_RUN`.

use std::{path::Path, time::Instant};

use aya::{
    Ebpf, EbpfLoader, Pod,
    maps::{Array, HashMap, MapData, PerCpuHashMap},
    programs::{Program, ProgramError, SchedClassifier, TestRun as _, TestRunOptions},
};

/// The programs of an object, loaded on maps of their own and attached to nothing.
#[derive(Debug)]
pub struct Object {
    ebpf: Ebpf,
}

impl Object {
    /// Loads every program of `object`, without features that only newer kernels have.
    pub fn load(object: &[u8]) -> Self {
        Self::load_with(object, &[])
    }

    /// Loads every program of `object` with values for some of its variables, by name.
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
                _ => panic!("{name} is of a type that the agent has no programs of"),
            };
            result.unwrap_or_else(|error| panic!("load {name}: {error}"));
        }
        Self { ebpf }
    }

    /// One of its programs.
    pub fn program(&self, name: &str) -> &SchedClassifier {
        self.ebpf.program(name).expect("a program of this name").try_into().expect("a TC program")
    }

    /// Sets the only element of an array.
    pub fn set<V: Pod>(&mut self, map: &str, value: V) {
        let mut map: Array<&mut MapData, V> =
            self.ebpf.map_mut(map).expect("a map of this name").try_into().expect("an array of this type");
        map.set(0, value, 0).expect("write the map");
    }

    /// Inserts into a hash.
    pub fn insert<K: Pod, V: Pod>(&mut self, map: &str, key: K, value: V) {
        let mut map: HashMap<&mut MapData, K, V> =
            self.ebpf.map_mut(map).expect("a map of this name").try_into().expect("a hash of this type");
        map.insert(key, value, 0).expect("write the map");
    }

    /// The values of a key of a per-CPU hash, one for each CPU; empty where it has none.
    pub fn per_cpu<K: Pod, V: Pod>(&self, map: &str, key: &K) -> Vec<V> {
        let map: PerCpuHashMap<&MapData, K, V> =
            self.ebpf.map(map).expect("a map of this name").try_into().expect("a per-CPU hash of this type");
        map.get(key, 0).map(|values| values.to_vec()).unwrap_or_default()
    }

    /// How many instructions the verifier went through for a program, where the kernel counts them.
    pub fn verified_instructions(&self, name: &str) -> Option<u32> {
        let program = self.ebpf.program(name).expect("a program of this name");
        let info = program.info().expect("describe a program");
        info.verified_instruction_count()
    }

    /// How many instructions a program has in the kernel, and bytes when it is compiled, where the kernel says.
    pub fn sizes(&self, name: &str) -> [Option<u32>; 2] {
        let info =
            self.ebpf.program(name).expect("a program of this name").info().expect("describe a program");
        let compiled = Some(info.size_jitted()).filter(|&size| size > 0);
        // Of eight bytes each (struct bpf_insn).
        [info.size_translated().map(|size| size / 8), compiled]
    }

    /// Names of its programs, sorted.
    pub fn program_names(&self) -> Vec<String> {
        sorted(self.ebpf.programs().map(|(name, _)| name))
    }

    /// Names of its maps, sorted, but for those of its constants and private variables.
    pub fn map_names(&self) -> Vec<String> {
        sorted(self.ebpf.maps().map(|(name, _)| name).filter(|name| ![".rodata", ".data"].contains(name)))
    }
}

fn sorted<'a>(names: impl Iterator<Item = &'a str>) -> Vec<String> {
    let mut names: Vec<_> = names.map(str::to_owned).collect();
    names.sort();
    names
}

/// The pinned program at `path`.
pub fn pinned(path: &Path) -> SchedClassifier {
    SchedClassifier::from_pin(path).expect("open a pinned TC program")
}

/// What the program returns for `packet`, which must come out of it as it went in.
pub fn action(program: &SchedClassifier, packet: &[u8]) -> i32 {
    try_action(program, packet).expect("the kernel takes this packet for a test run")
}

/// The same, or `None` for a packet that the kernel takes for no test run: it wants an Ethernet header and more, and
/// newer kernels a whole IP header where the EtherType says IP (`bpf_prog_test_run_skb`).
pub fn try_action(program: &SchedClassifier, packet: &[u8]) -> Option<i32> {
    let (action, after) = try_run(program, packet)?;
    assert_eq!(after, packet, "the program changed the packet");
    Some(action)
}

/// What the program returns for `packet`, and what it makes of it, or `None` likewise.
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

/// What the program returns for `packet` with this mark that came in by the interface of this index, and the mark that it
/// leaves; `None` where the kernel takes no such interface for a test run.
pub fn marked(
    program: &SchedClassifier,
    packet: &[u8],
    mark: u32,
    ingress_ifindex: u32,
) -> Option<(i32, u32)> {
    // Fields of struct __sk_buff (include/uapi/linux/bpf.h), of which a test run takes these and few more.
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

/// Nanoseconds that one run takes, on average over `repeat` of them. Taken around the call: what the kernel reports is
/// cut to whole ones, of which a run takes few.
pub fn nanoseconds(program: &SchedClassifier, packet: &[u8], repeat: u32) -> f64 {
    let options = TestRunOptions { data_in: Some(packet), repeat, ..TestRunOptions::default() };
    let start = Instant::now();
    program.test_run(options).expect("BPF_PROG_TEST_RUN");
    start.elapsed().as_secs_f64() * 1e9 / f64::from(repeat)
}
