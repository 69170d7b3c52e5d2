// Does one thing with a file that several processes share, for tests: each step is told on standard output.
//
// usage: volume-probe listen SOCKET           accepts one connection, tells what came, and answers "pong"
//        volume-probe connect SOCKET          sends "ping", and tells the answer
//        volume-probe hold FILE               takes a lock by fcntl, tells "held", keeps it until standard input ends
//        volume-probe try FILE                tells whether such a lock is "free" or "held" by another
//        volume-probe watch FILE CHARACTER    tells "mapped", and "seen" once a shared mapping begins with it
//        volume-probe set FILE CHARACTER      writes it there, through a shared mapping

#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <time.h>
#include <unistd.h>

static void fail(const char *what)
{
	perror(what);
	exit(1);
}

static void tell(const char *what)
{
	puts(what);
	fflush(stdout);
}

static int socket_at(const char *path, struct sockaddr_un *address)
{
	address->sun_family = AF_UNIX;
	if (strlen(path) >= sizeof(address->sun_path)) {
		errno = ENAMETOOLONG;
		fail(path);
	}
	strcpy(address->sun_path, path);
	const int made = socket(AF_UNIX, SOCK_STREAM, 0);
	if (made < 0)
		fail("socket");
	return made;
}

static void exchange(int connection, const char *say, int first)
{
	char heard[16] = "";
	if (first && write(connection, say, strlen(say)) < 0)
		fail("write");
	if (read(connection, heard, sizeof(heard) - 1) < 0)
		fail("read");
	tell(heard);
	if (!first && write(connection, say, strlen(say)) < 0)
		fail("write");
}

static void listen_at(const char *path)
{
	struct sockaddr_un address = { 0 };
	const int listener = socket_at(path, &address);
	if (bind(listener, (struct sockaddr *)&address, sizeof(address)) != 0 || listen(listener, 1) != 0)
		fail(path);
	const int connection = accept(listener, NULL, NULL);
	if (connection < 0)
		fail("accept");
	exchange(connection, "pong", 0);
}

static void connect_to(const char *path)
{
	struct sockaddr_un address = { 0 };
	const int connection = socket_at(path, &address);
	if (connect(connection, (struct sockaddr *)&address, sizeof(address)) != 0)
		fail(path);
	exchange(connection, "ping", 1);
}

static void lock(const char *path, int wait)
{
	struct flock range = { .l_type = F_WRLCK, .l_whence = SEEK_SET };
	const int file = open(path, O_RDWR);
	if (file < 0)
		fail(path);
	if (fcntl(file, F_SETLK, &range) != 0) {
		if (errno != EAGAIN && errno != EACCES)
			fail("fcntl");
		tell("held");
		exit(wait);
	}
	tell(wait ? "held" : "free");
	char byte;
	while (wait && read(STDIN_FILENO, &byte, 1) > 0)
		;
}

static volatile char *map(const char *path, int protection, int flags)
{
	const int file = open(path, flags);
	if (file < 0)
		fail(path);
	volatile char *mapped = mmap(NULL, 1, protection, MAP_SHARED, file, 0);
	if (mapped == MAP_FAILED)
		fail("mmap");
	return mapped;
}

static void watch(const char *path, char character)
{
	const struct timespec moment = { .tv_nsec = 10 * 1000 * 1000 };
	const volatile char *mapped = map(path, PROT_READ, O_RDONLY);
	// Touched, so that the page is there and does not come from the file later.
	if (*mapped == character) {
		tell("there already");
		exit(1);
	}
	tell("mapped");
	while (*mapped != character)
		nanosleep(&moment, NULL);
	tell("seen");
}

int main(int argc, char **argv)
{
	const char *what = argc > 2 ? argv[1] : "";
	if (argc == 3 && strcmp(what, "listen") == 0)
		listen_at(argv[2]);
	else if (argc == 3 && strcmp(what, "connect") == 0)
		connect_to(argv[2]);
	else if (argc == 3 && (strcmp(what, "hold") == 0 || strcmp(what, "try") == 0))
		lock(argv[2], strcmp(what, "hold") == 0);
	else if (argc == 4 && strcmp(what, "watch") == 0)
		watch(argv[2], argv[3][0]);
	else if (argc == 4 && strcmp(what, "set") == 0)
		*map(argv[2], PROT_READ | PROT_WRITE, O_RDWR) = argv[3][0];
	else {
		fprintf(stderr, "usage: volume-probe listen|connect|hold|try|watch|set FILE [CHARACTER]\n");
		return 2;
	}
	return 0;
}
