//! What the tests run in their containers, as a static program: each argument
//! is a command line, executed in turn; the output is for the test to read.

use std::fs;
use std::io::{Read, Write};
use std::os::unix::fs::{FileTypeExt, MetadataExt, PermissionsExt};

unsafe extern "C" {
    fn syscall(number: i64, ...) -> i64;
    fn mknod(path: *const u8, mode: u32, device: u64) -> i32;
    fn umask(mask: u32) -> u32;
    fn fork() -> i32;
    fn isatty(descriptor: i32) -> i32;
    fn getsid(pid: i32) -> i32;
    fn ioctl(descriptor: i32, request: u64, ...) -> i32;
}

fn kind(path: &str) -> String {
    match fs::symlink_metadata(path) {
        Err(error) => format!("{:?}", error.kind()),
        Ok(status) => {
            let kind = status.file_type();
            let name = if kind.is_dir() {
                "directory"
            } else if kind.is_symlink() {
                "link"
            } else if kind.is_char_device() {
                "device"
            } else {
                "file"
            };
            let device = status.rdev();
            format!(
                "{name} {:o} {}:{} {}:{}",
                status.mode() & 0o7777,
                status.uid(),
                status.gid(),
                device >> 8,
                device & 0xff
            )
        }
    }
}

fn run(line: &str) -> Result<String, std::io::Error> {
    let words: Vec<&str> = line.split(' ').collect();
    Ok(match words.as_slice() {
        ["cat", path] => fs::read_to_string(path)?,
        ["write", path, text] => {
            fs::write(path, text)?;
            "written".into()
        }
        ["append", path] => {
            fs::OpenOptions::new().append(true).open(path)?;
            "opened".into()
        }
        ["chmod", path, mode] => {
            let mode = u32::from_str_radix(mode, 8).unwrap();
            fs::set_permissions(path, fs::Permissions::from_mode(mode))?;
            "changed".into()
        }
        ["copy", from, to] => {
            fs::write(to, fs::read(from)?)?;
            "copied".into()
        }
        ["copy-input", path] => {
            fs::write(path, run("echo-input")?)?;
            "copied".into()
        }
        ["copy-env", path] => {
            fs::write(path, run("env")?)?;
            "copied".into()
        }
        ["mkdir", path] => {
            fs::create_dir(path)?;
            "made".into()
        }
        ["ls", path] => {
            let mut names: Vec<_> = fs::read_dir(path)?
                .map(|entry| entry.unwrap().file_name().into_string().unwrap())
                .collect();
            names.sort();
            names.join(" ")
        }
        ["stat", path] => kind(path),
        ["link", path] => fs::read_link(path)?.display().to_string(),
        ["read", path, bytes] => {
            let mut buffer = vec![0; bytes.parse().unwrap()];
            let len = fs::File::open(path)?.read(&mut buffer)?;
            format!("{len} bytes")
        }
        ["mknod", path, major, minor] => {
            let path = format!("{path}\0");
            let number = major.parse::<u64>().unwrap() << 8 | minor.parse::<u64>().unwrap();
            if unsafe { mknod(path.as_ptr(), 0o020666, number) } != 0 {
                return Err(std::io::Error::last_os_error());
            }
            "made".into()
        }
        ["env"] => {
            let mut all: Vec<_> = std::env::vars().map(|(k, v)| format!("{k}={v}")).collect();
            all.sort();
            all.join(" ")
        }
        ["cwd"] => std::env::current_dir()?.display().to_string(),
        ["umask"] => format!("{:o}", unsafe { umask(0) }),
        ["pid"] => std::process::id().to_string(),
        ["session"] => unsafe { getsid(0) }.to_string(),
        ["descriptors"] => {
            // One of them is the directory that is being read.
            let mut open: Vec<String> = Vec::new();
            for entry in fs::read_dir("/proc/self/fd")? {
                open.push(entry?.file_name().into_string().unwrap());
            }
            open.len().saturating_sub(1).to_string()
        }
        ["syscall", number] => {
            if unsafe { syscall(number.parse().unwrap(), -1_i64, -1_i64, 0_i64) } < 0 {
                return Err(std::io::Error::last_os_error());
            }
            "done".into()
        }
        ["number", call, arguments @ ..] => {
            let argument = |at: usize| arguments.get(at).map_or(0, |text| text.parse().unwrap());
            let (first, second): (i64, i64) = (argument(0), argument(1));
            let answer = unsafe { syscall(call.parse().unwrap(), first, second, 0_i64) };
            if answer < 0 {
                return Err(std::io::Error::last_os_error());
            }
            answer.to_string()
        }
        ["mempolicy"] => {
            let mut mode = 0_i32;
            let none = 0_i64;
            if unsafe { syscall(239, &raw mut mode, none, none, none, none) } < 0 {
                return Err(std::io::Error::last_os_error());
            }
            mode.to_string()
        }
        ["clock", number] => {
            let mut time = [0_i64; 2];
            unsafe { syscall(228, number.parse::<i64>().unwrap(), time.as_mut_ptr()) };
            format!("{}.{:09}", time[0], time[1])
        }
        ["terminal"] => {
            let mut size = [0_u16; 4];
            unsafe { ioctl(0, 0x5413, size.as_mut_ptr()) };
            format!("{} {}x{}", unsafe { isatty(0) }, size[0], size[1])
        }
        ["escape"] => {
            // The classic: a working directory outside of the root, then up.
            fs::create_dir("/below")?;
            std::os::unix::fs::chroot("/below")?;
            for _ in 0..64 {
                std::env::set_current_dir("..")?;
            }
            std::os::unix::fs::chroot(".")?;
            run("ls /")?
        }
        ["echo-input"] => {
            let mut text = String::new();
            std::io::stdin().read_to_string(&mut text)?;
            text
        }
        ["echo-line"] => {
            let mut text = String::new();
            std::io::stdin().read_line(&mut text)?;
            text
        }
        ["count"] => {
            for number in 0_u64.. {
                println!("{number}");
            }
            unreachable!()
        }
        ["fork-forever", count] => {
            for _ in 0..count.parse::<u32>().unwrap() {
                if unsafe { fork() } == 0 {
                    sleep();
                }
            }
            "forked".into()
        }
        ["sleep"] => sleep(),
        ["exit", code] => std::process::exit(code.parse().unwrap()),
        _ => panic!("unknown command {line:?}"),
    })
}

fn sleep() -> ! {
    loop {
        std::thread::park();
    }
}

fn main() {
    for line in std::env::args().skip(1) {
        let text = match run(&line) {
            Ok(text) => text,
            Err(error) => format!("error {}", error.raw_os_error().unwrap_or(-1)),
        };
        let mut stdout = std::io::stdout().lock();
        writeln!(stdout, "== {line}\n{text}").unwrap();
        stdout.flush().unwrap();
    }
}
