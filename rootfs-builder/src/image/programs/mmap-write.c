// Writes a file through a shared mapping only, tells so, and waits to be killed: what it wrote must not be lost.
//
// usage: mmap-write FILE BYTES

#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

int main(int argc, char **argv)
{
	if (argc != 3) {
		fprintf(stderr, "usage: mmap-write FILE BYTES\n");
		return 2;
	}
	const size_t bytes = strtoul(argv[2], NULL, 10);
	const int file = open(argv[1], O_RDWR | O_CREAT | O_TRUNC, 0644);
	if (file < 0 || ftruncate(file, (off_t)bytes) != 0) {
		perror(argv[1]);
		return 1;
	}
	char *map = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_SHARED, file, 0);
	if (map == MAP_FAILED) {
		perror("mmap");
		return 1;
	}
	memset(map, 'x', bytes);
	puts("written");
	fflush(stdout);
	for (;;)
		pause();
}
