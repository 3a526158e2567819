/* A closed-loop client for a router on the loopback: one thread, epoll, one request at a time a connection.
 *
 *     load_client PORT CONCURRENCY SECONDS WARMUP_S json|stream MAX_TOKENS PROMPT_BYTES PAUSE_US
 *
 * PAUSE_US is the mean of a connection's pause between two requests (evenly from 0 to twice that).
 * Prints one JSON line: requests, latency and time to the first event (us, 50th and 99th percentile), events, the
 * one-way delay of events (us; from the "t" that mock_worker.c writes into each), errors. Requests that began
 * in the warm-up are not counted, but in all_requests and all_events: what the router spent CPU time on.
 */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <netinet/tcp.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/socket.h>
#include <sys/timerfd.h>
#include <time.h>
#include <unistd.h>

#define HEAD_BYTES 4096
#define MAX_SAMPLES 4000000
#define MAX_DIGITS 23

typedef struct Samples { /* in tenths of a microsecond */
    unsigned *values;
    long count;
} Samples;

typedef enum State { HEAD, LENGTH_BODY, CHUNK_SIZE, CHUNK_DATA, LAST_CRLF } State;

typedef struct Connection {
    int fd, status;
    State state;
    char head[HEAD_BYTES];
    size_t head_length, left; /* bytes that are still to come in this state */
    char size_line[32];
    int size_length;
    long long started_ns, due_ns; /* due: when the next request is sent; 0: one is running */
    bool running, has_body, closes;
    int matched, num_digits; /* of the "t" that is being read; -1: none is */
    char digits[MAX_DIGITS + 1];
} Connection;

static struct sockaddr_in server;
static int poller;
static char *request;
static size_t request_length;
static bool reads_events;
static long long measured_from_ns, pause_ns;
static Connection *connections;
static int concurrency, timer;
static long long timer_due_ns; /* 0: it is not set */
static Samples latencies, first_events, delays;
static long num_requests, num_errors, num_refused, num_events, all_requests, all_events;

static long long now_ns(void) {
    struct timespec time;
    clock_gettime(CLOCK_MONOTONIC, &time);
    return time.tv_sec * 1000000000LL + time.tv_nsec;
}

static void add(Samples *samples, long long ns) {
    if (!samples->values) samples->values = malloc(MAX_SAMPLES * sizeof *samples->values);
    if (samples->count < MAX_SAMPLES) samples->values[samples->count++] = ns < 0 ? 0 : ns / 100;
}

static int compare(const void *left, const void *right) {
    unsigned a = *(const unsigned *)left, b = *(const unsigned *)right;
    return (a > b) - (a < b);
}

static void print_percentiles(const char *name, Samples *samples) {
    if (samples->count == 0) {
        printf("\"%s_p50_us\":null,\"%s_p99_us\":null,", name, name);
        return;
    }
    qsort(samples->values, samples->count, sizeof *samples->values, compare);
    printf("\"%s_p50_us\":%.1f,\"%s_p99_us\":%.1f,", name, samples->values[(samples->count - 1) / 2] / 10.0, name,
           samples->values[(long)((samples->count - 1) * 0.99)] / 10.0);
}

static void open_connection(Connection *connection) {
    int on = 1;
    connection->fd = socket(AF_INET, SOCK_STREAM, 0);
    setsockopt(connection->fd, IPPROTO_TCP, TCP_NODELAY, &on, sizeof on);
    if (connect(connection->fd, (struct sockaddr *)&server, sizeof server)) {
        perror("load_client");
        exit(1);
    }
    struct epoll_event event = {.events = EPOLLIN, .data.ptr = connection};
    epoll_ctl(poller, EPOLL_CTL_ADD, connection->fd, &event);
}

static void send_request(Connection *connection) {
    connection->state = HEAD;
    connection->head_length = 0;
    connection->matched = 0;
    connection->num_digits = -1;
    connection->has_body = false;
    connection->running = true;
    connection->due_ns = 0;
    connection->started_ns = now_ns();
    if (send(connection->fd, request, request_length, MSG_NOSIGNAL) != (ssize_t)request_length) num_errors++;
}

static void open_again(Connection *connection) {
    close(connection->fd);
    open_connection(connection);
    send_request(connection);
}

static void end_request(Connection *connection, long long at_ns) {
    connection->running = false;
    all_requests++;
    if (connection->started_ns < measured_from_ns) return;
    num_requests++;
    add(&latencies, at_ns - connection->started_ns);
    if (connection->status != 200) num_refused++;
}

/* Finds "t":DIGITS in the events; one may be split over reads. */
static void read_events(Connection *connection, const char *data, size_t length, long long at_ns) {
    static const char key[] = "\"t\":";
    for (size_t i = 0; i < length; i++) {
        char byte = data[i];
        if (connection->num_digits < 0) {
            if (byte == key[connection->matched]) {
                if (++connection->matched == sizeof key - 1) connection->matched = connection->num_digits = 0;
            } else {
                connection->matched = byte == '"';
            }
        } else if (byte >= '0' && byte <= '9') {
            if (connection->num_digits < MAX_DIGITS) connection->digits[connection->num_digits++] = byte;
        } else {
            connection->digits[connection->num_digits] = 0;
            connection->num_digits = -1;
            all_events++;
            if (at_ns < measured_from_ns) continue;
            num_events++;
            add(&delays, at_ns - atoll(connection->digits));
        }
    }
}

static void read_body(Connection *connection, const char *data, size_t length, long long at_ns) {
    if (!connection->has_body && connection->started_ns >= measured_from_ns)
        add(&first_events, at_ns - connection->started_ns);
    connection->has_body = true;
    if (reads_events) read_events(connection, data, length, at_ns);
}

/* The bytes used of the head; 0: it does not fit. */
static size_t read_head(Connection *connection, const char *data, size_t length) {
    size_t room = HEAD_BYTES - 1 - connection->head_length, copied = length < room ? length : room;
    memcpy(connection->head + connection->head_length, data, copied);
    char *end = memmem(connection->head, connection->head_length + copied, "\r\n\r\n", 4);
    if (!end) {
        connection->head_length += copied;
        return copied < length ? 0 : copied;
    }
    size_t total = end + 4 - connection->head, used = total - connection->head_length;
    connection->head[total] = 0;
    connection->status = atoi(connection->head + 9);
    connection->closes = strcasestr(connection->head, "connection: close") != NULL;
    bool chunked = strcasestr(connection->head, "transfer-encoding: chunked") != NULL;
    char *found = strcasestr(connection->head, "content-length:");
    connection->left = found ? strtoul(found + 15, NULL, 10) : 0;
    connection->state = chunked ? CHUNK_SIZE : LENGTH_BODY;
    connection->size_length = 0;
    return used;
}

static size_t read_size_line(Connection *connection, char byte) {
    if (byte != '\n') {
        if (connection->size_length < (int)sizeof connection->size_line - 1)
            connection->size_line[connection->size_length++] = byte;
        return 1;
    }
    connection->size_line[connection->size_length] = 0;
    connection->size_length = 0;
    size_t size = strtoul(connection->size_line, NULL, 16);
    connection->state = size ? CHUNK_DATA : LAST_CRLF;
    connection->left = size + 2;
    return 1;
}

/* 1: the response is complete; -1: it is broken. */
static int receive(Connection *connection, const char *data, size_t length, long long at_ns) {
    while (length > 0 || (connection->state == LENGTH_BODY && connection->left == 0)) {
        size_t used = length < connection->left ? length : connection->left;
        switch (connection->state) {
        case HEAD:
            used = read_head(connection, data, length);
            if (used == 0) return -1;
            break;
        case CHUNK_SIZE:
            used = read_size_line(connection, *data);
            break;
        case CHUNK_DATA: { /* `left` counts the CRLF behind the data */
            size_t payload = connection->left > 2 ? connection->left - 2 : 0;
            if (payload) read_body(connection, data, used < payload ? used : payload, at_ns);
            connection->left -= used;
            if (connection->left == 0) connection->state = CHUNK_SIZE;
            break;
        }
        case LENGTH_BODY:
            if (used) read_body(connection, data, used, at_ns);
            connection->left -= used;
            if (connection->left == 0) return 1;
            break;
        case LAST_CRLF:
            connection->left -= used;
            if (connection->left == 0) return 1;
            break;
        }
        data += used;
        length -= used;
    }
    return 0;
}

static void build_request(int port, long max_tokens, size_t prompt_bytes) {
    char *prompt = malloc(prompt_bytes + 1), *body = malloc(prompt_bytes + 400);
    request = malloc(prompt_bytes + 800);
    for (size_t i = 0; i < prompt_bytes; i++) prompt[i] = i % 5 ? 'x' : ' ';
    prompt[prompt_bytes] = 0;
    int length = sprintf(
        body, "{\"model\":\"mock\",\"prompt\":\"%s\",\"max_tokens\":%ld,\"temperature\":0,\"stream\":%s}", prompt,
        max_tokens, reads_events ? "true" : "false");
    request_length = sprintf(request,
                             "POST /v1/completions HTTP/1.1\r\nHost: 127.0.0.1:%d\r\nContent-Type: application/json\r\n"
                             "Authorization: Bearer k\r\nContent-Length: %d\r\n\r\n%s",
                             port, length, body);
    free(prompt);
    free(body);
}

static void set_timer(long long due_ns) {
    struct itimerspec setting = {.it_value = {due_ns / 1000000000, due_ns % 1000000000}};
    timerfd_settime(timer, TFD_TIMER_ABSTIME, &setting, NULL);
    timer_due_ns = due_ns;
}

/* Sends what is due, and sets the timer for what is not. */
static void send_due(void) {
    unsigned long long expirations;
    if (read(timer, &expirations, sizeof expirations) < 0) return;
    long long at_ns = now_ns(), next_ns = 0;
    timer_due_ns = 0;
    for (int i = 0; i < concurrency; i++) {
        Connection *connection = &connections[i];
        if (connection->due_ns == 0) continue;
        if (connection->due_ns <= at_ns)
            send_request(connection);
        else if (next_ns == 0 || connection->due_ns < next_ns)
            next_ns = connection->due_ns;
    }
    if (next_ns) set_timer(next_ns);
}

static void rest(Connection *connection) {
    connection->due_ns = now_ns() + (long long)(drand48() * 2 * pause_ns) + 1;
    if (timer_due_ns == 0 || connection->due_ns < timer_due_ns) set_timer(connection->due_ns);
}

static void serve_ready(Connection *connection) {
    static char data[1 << 18];
    ssize_t count = read(connection->fd, data, sizeof data);
    long long at_ns = now_ns();
    int outcome = count > 0 ? receive(connection, data, count, at_ns) : -1;
    if (outcome < 0) {
        if (connection->running && at_ns >= measured_from_ns) num_errors++;
        open_again(connection);
    } else if (outcome > 0) {
        end_request(connection, at_ns);
        if (connection->closes)
            open_again(connection);
        else if (pause_ns)
            rest(connection);
        else
            send_request(connection);
    }
}

int main(int count, char **arguments) {
    if (count != 9) {
        fprintf(stderr, "usage: load_client PORT CONCURRENCY SECONDS WARMUP_S json|stream MAX_TOKENS PROMPT_BYTES "
                        "PAUSE_US\n");
        return 2;
    }
    int port = atoi(arguments[1]);
    concurrency = atoi(arguments[2]);
    double seconds = atof(arguments[3]), warmup_s = atof(arguments[4]);
    reads_events = strcmp(arguments[5], "stream") == 0;
    pause_ns = atoll(arguments[8]) * 1000;
    build_request(port, atol(arguments[6]), atol(arguments[7]));
    server = (struct sockaddr_in){.sin_family = AF_INET, .sin_port = htons(port)};
    server.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    poller = epoll_create1(0);
    timer = timerfd_create(CLOCK_MONOTONIC, TFD_NONBLOCK);
    struct epoll_event timer_event = {.events = EPOLLIN, .data.ptr = NULL};
    epoll_ctl(poller, EPOLL_CTL_ADD, timer, &timer_event);
    connections = calloc(concurrency, sizeof *connections);
    measured_from_ns = now_ns() + (long long)(warmup_s * 1e9);
    long long end_ns = measured_from_ns + (long long)(seconds * 1e9);
    for (int i = 0; i < concurrency; i++) {
        open_connection(&connections[i]);
        if (pause_ns)
            rest(&connections[i]);
        else
            send_request(&connections[i]);
    }
    struct epoll_event ready[256];
    while (now_ns() < end_ns) {
        int num_ready = epoll_wait(poller, ready, 256, 200);
        for (int i = 0; i < num_ready; i++) {
            if (ready[i].data.ptr)
                serve_ready(ready[i].data.ptr);
            else
                send_due();
        }
    }
    double elapsed_s = (now_ns() - measured_from_ns) / 1e9;
    printf("{\"seconds\":%.3f,\"requests\":%ld,\"errors\":%ld,\"refused\":%ld,\"events\":%ld,", elapsed_s, num_requests,
           num_errors, num_refused, num_events);
    printf("\"all_requests\":%ld,\"all_events\":%ld,", all_requests, all_events);
    print_percentiles("latency", &latencies);
    print_percentiles("first_event", &first_events);
    print_percentiles("delay", &delays);
    printf("\"requests_per_s\":%.0f,\"events_per_s\":%.0f}\n", num_requests / elapsed_s, num_events / elapsed_s);
    return 0;
}
