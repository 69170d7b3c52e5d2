// A FUSE file system whose server answers as long as only its root is looked at, and never answers what is asked of
// anything in it: for tests of what such a server may hold up.
//
// usage: hang-fs DIRECTORY    mounts there, tells "mounted", and serves until it is killed

#include <errno.h>
#include <fcntl.h>
#include <linux/fuse.h>
#include <stdio.h>
#include <string.h>
#include <sys/mount.h>
#include <sys/stat.h>
#include <sys/uio.h>
#include <unistd.h>

static int answer(int device, const struct fuse_in_header *request, int error, void *body, size_t bytes)
{
	struct fuse_out_header header = {
		.len = sizeof(header) + bytes,
		.error = -error,
		.unique = request->unique,
	};
	const struct iovec parts[] = { { &header, sizeof(header) }, { body, bytes } };
	return writev(device, parts, bytes ? 2 : 1) < 0 ? -1 : 0;
}

static void serve(int device, const struct fuse_in_header *request)
{
	if (request->opcode == FUSE_INIT) {
		const struct fuse_init_in *asked = (const void *)(request + 1);
		struct fuse_init_out init = {
			.major = FUSE_KERNEL_VERSION,
			.minor = FUSE_KERNEL_MINOR_VERSION,
			.max_readahead = asked->max_readahead,
			.max_write = 4096,
			.max_background = 1024,
		};
		answer(device, request, 0, &init, sizeof(init));
	} else if (request->opcode == FUSE_GETATTR && request->nodeid == FUSE_ROOT_ID) {
		struct fuse_attr_out out = {
			.attr_valid = 3600,
			.attr = { .ino = FUSE_ROOT_ID, .mode = S_IFDIR | 0755, .nlink = 2, .blksize = 4096 },
		};
		answer(device, request, 0, &out, sizeof(out));
	} else if (request->opcode == FUSE_STATFS) {
		struct fuse_statfs_out out = { .st = { .bsize = 4096, .namelen = 255 } };
		answer(device, request, 0, &out, sizeof(out));
	} else if (request->opcode == FUSE_GETXATTR || request->opcode == FUSE_ACCESS) {
		answer(device, request, ENOSYS, NULL, 0);
	}
	// The rest waits for ever.
}

int main(int argc, char **argv)
{
	static char request[1 << 20];
	char options[128];
	if (argc != 2) {
		fprintf(stderr, "usage: hang-fs DIRECTORY\n");
		return 2;
	}
	const int device = open("/dev/fuse", O_RDWR);
	if (device < 0) {
		perror("/dev/fuse");
		return 1;
	}
	snprintf(options, sizeof(options), "fd=%d,rootmode=40000,user_id=0,group_id=0,allow_other", device);
	if (mount("hang-fs", argv[1], "fuse.hang", 0, options) != 0) {
		perror(argv[1]);
		return 1;
	}
	puts("mounted");
	fflush(stdout);
	for (;;) {
		const ssize_t bytes = read(device, request, sizeof(request));
		if (bytes >= (ssize_t)sizeof(struct fuse_in_header))
			serve(device, (const struct fuse_in_header *)request);
		else if (bytes < 0 && errno != EINTR && errno != EAGAIN && errno != ENOENT)
			return 0;
	}
}
