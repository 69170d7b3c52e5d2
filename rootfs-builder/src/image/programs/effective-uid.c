/* Tells the user that it runs as: with a set-user-ID bit another one than its caller, unless that is forbidden. */
#include <stdio.h>
#include <unistd.h>

int main(void) {
    printf("Effective uid: %u\n", (unsigned)geteuid());
    return 0;
}
