#include <stdio.h>
#include <unistd.h>

int main(void) {
    printf("static %s as %d\n", VERSION, getuid());
    return 0;
}
