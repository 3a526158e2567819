/* A worker without a model, fast enough not to be what a router's benchmark measures: one thread, epoll.
 *
 *     mock_worker PORT TICK_US prefill|decode|any
 *
 * GET: any path is answered with one JSON object in which every router finds what it asks a worker for.
 * POST: what the body asks for, decided by searching it, never by parsing:
 *     "request_type":"context_only"   a context leg's answer (docs/protocol.md), "stream_head" included
 *     "stream":true                   max_tokens server-sent events (less the one that stream_head had), one
 *                                     HTTP chunk each; TICK_US = 0: all at once; else one a tick and stream
 *     otherwise                       one JSON answer, which serves as another system's prefill answer too
 * A worker started as `prefill` answers every POST with JSON. Each event carries "t", the monotonic clock in
 * nanoseconds at which it was written. A stream that is asked for with X-Diptych-Journal is journaled (docs/protocol.md).
 */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <netinet/tcp.h>
#include <signal.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/socket.h>
#include <sys/timerfd.h>
#include <time.h>
#include <unistd.h>

#define MAX_EVENTS 512
#define MIN_ROOM 16384

typedef struct Buffer {
    char *data;
    size_t length, capacity, sent;
} Buffer;

typedef struct Connection {
    int fd;
    Buffer in, out;
    long events_left; /* of the stream that runs on it */
    bool chat, journal, waits_for_room;
    struct Connection *previous, *next; /* in the list of running streams */
} Connection;

static int poller;
static long tick_us;
static bool is_prefill;
static unsigned long num_requests;
static Connection streams; /* the list's head */
static volatile sig_atomic_t stopping;

static void stop(int number) {
    (void)number;
    stopping = 1;
}

static long long now_ns(void) {
    struct timespec time;
    clock_gettime(CLOCK_MONOTONIC, &time);
    return time.tv_sec * 1000000000LL + time.tv_nsec;
}

static void reserve(Buffer *buffer, size_t room) {
    if (buffer->length + room <= buffer->capacity) return;
    buffer->capacity = (buffer->length + room) * 2;
    buffer->data = realloc(buffer->data, buffer->capacity);
    if (!buffer->data) abort();
}

static void append(Buffer *buffer, const char *data, size_t length) {
    reserve(buffer, length);
    memcpy(buffer->data + buffer->length, data, length);
    buffer->length += length;
}

static void watch(Connection *connection, int operation, uint32_t events) {
    struct epoll_event event = {.events = events, .data.ptr = connection};
    epoll_ctl(poller, operation, connection->fd, &event);
}

static void leave_streams(Connection *connection) {
    if (!connection->next) return;
    connection->previous->next = connection->next;
    connection->next->previous = connection->previous;
    connection->next = connection->previous = NULL;
}

static void join_streams(Connection *connection) {
    connection->next = streams.next;
    connection->previous = &streams;
    streams.next->previous = connection;
    streams.next = connection;
}

static void drop(Connection *connection) {
    leave_streams(connection);
    close(connection->fd);
    free(connection->in.data);
    free(connection->out.data);
    free(connection);
}

/* False: the connection is broken. */
static bool flush(Connection *connection) {
    Buffer *out = &connection->out;
    while (out->sent < out->length) {
        ssize_t count = send(connection->fd, out->data + out->sent, out->length - out->sent, MSG_NOSIGNAL);
        if (count < 0) {
            if (errno != EAGAIN) return false;
            if (!connection->waits_for_room) watch(connection, EPOLL_CTL_MOD, EPOLLIN | EPOLLOUT);
            connection->waits_for_room = true;
            return true;
        }
        out->sent += count;
    }
    out->length = out->sent = 0;
    if (connection->waits_for_room) watch(connection, EPOLL_CTL_MOD, EPOLLIN);
    connection->waits_for_room = false;
    return true;
}

static int format_event(char *into, size_t size, bool chat, bool last) {
    const char *shape = chat ? "\"delta\":{\"content\":\" token\"}" : "\"text\":\" token\"";
    return snprintf(into, size,
                    "data: {\"id\":\"cmpl-0123456789abcdef\",\"object\":\"%s\",\"created\":1760000000,\"model\":\"mock\","
                    "\"choices\":[{\"index\":0,%s,\"logprobs\":null,\"finish_reason\":%s}],\"t\":%lld}\n\n",
                    chat ? "chat.completion.chunk" : "text_completion", shape, last ? "\"length\"" : "null", now_ns());
}

static void put_event(Connection *connection) {
    static const char end[] = "e\r\ndata: [DONE]\n\n\r\n0\r\n\r\n";
    static const char journaled_end[] = "14\r\n: end\ndata: [DONE]\n\n\r\n0\r\n\r\n";
    bool last = --connection->events_left == 0;
    char event[640], chunk[700];
    int length = connection->journal ? snprintf(event, sizeof event, ": 0=4711\n") : 0;
    length += format_event(event + length, sizeof event - length, connection->chat, last);
    int chunk_length = snprintf(chunk, sizeof chunk, "%x\r\n%.*s\r\n", length, length, event);
    append(&connection->out, chunk, chunk_length);
    if (last && connection->journal)
        append(&connection->out, journaled_end, sizeof journaled_end - 1);
    else if (last)
        append(&connection->out, end, sizeof end - 1);
}

static void put_json(Connection *connection, const char *body, int length) {
    char head[144];
    int head_length = snprintf(
        head, sizeof head,
        "HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nX-Diptych-Fetched: 1\r\nContent-Length: %d\r\n\r\n",
        length);
    append(&connection->out, head, head_length);
    append(&connection->out, body, length);
}

static void put_facts(Connection *connection) {
    static const char facts[] =
        "{\"status\":\"ok\",\"state\":\"READY\",\"model\":\"mock\",\"models\":[\"mock\"],\"incarnation\":\"1\",\"kv_endpoint\":\"mock:1/1\","
        "\"object\":\"list\",\"data\":[{\"id\":\"mock\",\"object\":\"model\",\"created\":1,\"owned_by\":\"mock\","
        "\"max_model_len\":32768}],\"model_path\":\"mock\",\"tokenizer_path\":\"mock\",\"served_model_name\":\"mock\","
        "\"is_generation\":true,\"model_type\":\"llama\",\"architectures\":[\"LlamaForCausalLM\"],\"dp_size\":1,"
        "\"tp_size\":1,\"disaggregation_mode\":\"null\",\"version\":\"mock\",\"max_total_num_tokens\":100000}";
    put_json(connection, facts, sizeof facts - 1);
}

#define TICKET_64 "QUJDREVGR0hJSktMTU5PUFFSU1RVVldYWVphYmNkZWZnaGlqa2xtbm9wcXJzdHV2"
#define TICKET TICKET_64 TICKET_64 TICKET_64 TICKET_64 TICKET_64 TICKET_64 TICKET_64 TICKET_64

static void put_context_answer(Connection *connection, bool stream) {
    char event[640], escaped[900], answer[4096];
    int escaped_length = 0;
    if (stream) {
        int length = format_event(event, sizeof event, connection->chat, false);
        for (int i = 0; i < length; i++) {
            if (event[i] == '\n') {
                escaped[escaped_length++] = '\\';
                escaped[escaped_length++] = 'n';
                continue;
            }
            if (event[i] == '"') escaped[escaped_length++] = '\\';
            escaped[escaped_length++] = event[i];
        }
    }
    int length = snprintf(
        answer, sizeof answer,
        "{\"id\":\"cmpl-0\",\"object\":\"text_completion\",\"created\":1760000000,\"model\":\"mock\",\"choices\":[{"
        "\"index\":0,\"text\":\" token\",\"finish_reason\":\"not_finished\",\"disaggregated_params\":{"
        "\"request_type\":\"context_only\",\"disagg_request_id\":\"0\",\"response_id\":\"cmpl-0\","
        "\"created\":1760000000,\"ctx_request_id\":\"%lu\",\"first_gen_tokens\":[4711],\"first_gen_logprobs\":null,"
        "\"encoded_opaque_state\":\"" TICKET "\",\"ticket_id\":\"%lu\",\"cached_tokens\":0}}],"
        "\"usage\":{\"prompt_tokens\":16,\"completion_tokens\":1,\"total_tokens\":17},"
        "\"prompt_token_ids\":[[1,2,3,4,5,6,7,8,9,10,11,12,13,14,15,16]],%s%.*s%s\"finished\":false}",
        num_requests, num_requests, stream ? "\"stream_head\":\"" : "", escaped_length, escaped, stream ? "\"," : "");
    put_json(connection, answer, length);
}

static void put_answer(Connection *connection, long num_tokens) {
    char answer[1400];
    int length = snprintf(
        answer, sizeof answer,
        "{\"id\":\"cmpl-0123456789abcdef\",\"object\":\"%s\",\"created\":1760000000,\"model\":\"mock\",\"choices\":[{"
        "\"index\":0,%s,\"logprobs\":null,\"finish_reason\":\"length\"}],\"usage\":{\"prompt_tokens\":16,"
        "\"completion_tokens\":%ld,\"total_tokens\":%ld},\"kv_transfer_params\":{\"do_remote_prefill\":true,"
        "\"do_remote_decode\":false,\"remote_block_ids\":[1,2,3,4],\"remote_engine_id\":\"e0\","
        "\"remote_host\":\"127.0.0.1\",\"remote_port\":5600}}",
        connection->chat ? "chat.completion" : "text_completion",
        connection->chat ? "\"message\":{\"role\":\"assistant\",\"content\":\" token token\"}" : "\"text\":\" token token\"",
        num_tokens, num_tokens + 16);
    put_json(connection, answer, length);
}

static bool has(const char *text, size_t length, const char *needle) {
    return memmem(text, length, needle, strlen(needle)) != NULL;
}

/* The whole number behind `key`, or `otherwise`. */
static long number_of(const char *body, size_t length, const char *key, long otherwise) {
    const char *found = memmem(body, length, key, strlen(key));
    if (!found) return otherwise;
    found += strlen(key);
    while (found < body + length && (*found == ' ' || *found == ':')) found++;
    long value = atol(found);
    return value > 0 ? value : otherwise;
}

static void answer(Connection *connection, const char *head, size_t head_length, const char *body, size_t length) {
    static const char stream_head[] =
        "HTTP/1.1 200 OK\r\nContent-Type: text/event-stream; charset=utf-8\r\nCache-Control: no-cache\r\n"
        "X-Diptych-Fetched: 1\r\nTransfer-Encoding: chunked\r\n";
    num_requests++;
    if (memcmp(head, "GET", 3) == 0) {
        put_facts(connection);
        return;
    }
    connection->chat = has(head, head_length < 64 ? head_length : 64, "/chat/");
    connection->journal = has(head, head_length, "Diptych-Journal");
    bool stream = has(body, length, "\"stream\":true") || has(body, length, "\"stream\": true");
    long num_tokens = number_of(body, length, "\"max_tokens\"", 64);
    bool is_second = has(body, length, "\"request_type\":\"generation_only\""); /* it quotes the first leg's too */
    if (!is_second && has(body, length, "\"request_type\":\"context_only\"")) {
        put_context_answer(connection, stream);
    } else if (!stream || is_prefill) {
        put_answer(connection, num_tokens);
    } else {
        append(&connection->out, stream_head, sizeof stream_head - 1);
        if (connection->journal) append(&connection->out, "X-Diptych-Journal: 1\r\n", 22);
        append(&connection->out, "\r\n", 2);
        connection->events_left = num_tokens > 1 && is_second ? num_tokens - 1 : num_tokens;
        if (tick_us) join_streams(connection);
        while (!tick_us && connection->events_left) put_event(connection);
    }
}

/* The length of a chunked body with its framing, whose data is moved together at `body`; 0: not all here. */
static size_t unchunk(char *body, size_t available, size_t *data_length) {
    char *at = body, *end = body + available, *into = body;
    for (char *probe = body;;) { /* first see that all of it is here: what is moved cannot be read again */
        char *line_end = memmem(probe, end - probe, "\r\n", 2);
        if (!line_end) return 0;
        size_t size = strtoul(probe, NULL, 16);
        if ((size_t)(end - line_end) < size + 4) return 0;
        probe = line_end + size + 4;
        if (size == 0) break;
    }
    for (;;) {
        char *line_end = memmem(at, end - at, "\r\n", 2);
        size_t size = strtoul(at, NULL, 16);
        if (size == 0) {
            *data_length = into - body;
            return line_end + 4 - body;
        }
        memmove(into, line_end + 2, size);
        into += size;
        at = line_end + size + 4;
    }
}

/* Answers the requests that are complete. False: the connection is broken. */
static bool process(Connection *connection) {
    Buffer *in = &connection->in;
    size_t used = 0;
    while (connection->events_left == 0 && used < in->length) {
        char *head = in->data + used;
        char *head_end = memmem(head, in->length - used, "\r\n\r\n", 4);
        if (!head_end) break;
        size_t head_length = head_end + 4 - head, available = in->length - used - head_length;
        size_t body_length = 0, taken;
        bool chunked = false;
        for (char *line = head; line < head_end; line++) {
            if (*line != '\n') continue;
            if (!strncasecmp(line + 1, "content-length:", 15)) body_length = strtoul(line + 16, NULL, 10);
            if (!strncasecmp(line + 1, "transfer-encoding: chunked", 26)) chunked = true;
        }
        if (chunked) {
            taken = unchunk(head + head_length, available, &body_length);
            if (taken == 0) break;
        } else if (available < body_length) {
            break;
        } else {
            taken = body_length;
        }
        answer(connection, head, head_length, head + head_length, body_length);
        used += head_length + taken;
    }
    memmove(in->data, in->data + used, in->length - used);
    in->length -= used;
    return flush(connection);
}

static bool receive(Connection *connection) {
    Buffer *in = &connection->in;
    reserve(in, MIN_ROOM);
    ssize_t count = read(connection->fd, in->data + in->length, in->capacity - in->length);
    if (count == 0 || (count < 0 && errno != EAGAIN)) return false;
    if (count > 0) in->length += count;
    return process(connection);
}

static void tick(int timer) {
    unsigned long long expirations;
    if (read(timer, &expirations, sizeof expirations) < 0) return;
    for (Connection *connection = streams.next, *next; connection != &streams; connection = next) {
        next = connection->next;
        put_event(connection);
        if (connection->events_left == 0) leave_streams(connection);
        if (!flush(connection)) shutdown(connection->fd, SHUT_RDWR); /* epoll tells, and it is dropped there */
    }
}

static void accept_all(int listener) {
    int fd, on = 1;
    while ((fd = accept4(listener, NULL, NULL, SOCK_NONBLOCK)) >= 0) {
        setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &on, sizeof on);
        Connection *connection = calloc(1, sizeof *connection);
        if (!connection) abort();
        connection->fd = fd;
        watch(connection, EPOLL_CTL_ADD, EPOLLIN);
    }
}

static int listen_on(int port) {
    struct sockaddr_in address = {.sin_family = AF_INET, .sin_port = htons(port)};
    address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    int listener = socket(AF_INET, SOCK_STREAM | SOCK_NONBLOCK, 0), on = 1;
    setsockopt(listener, SOL_SOCKET, SO_REUSEADDR, &on, sizeof on);
    if (bind(listener, (struct sockaddr *)&address, sizeof address) || listen(listener, 4096)) {
        perror("mock_worker");
        exit(1);
    }
    return listener;
}

static int start_timer(void) {
    int timer = timerfd_create(CLOCK_MONOTONIC, TFD_NONBLOCK);
    struct timespec period = {tick_us / 1000000, tick_us % 1000000 * 1000};
    struct itimerspec setting = {period, period};
    timerfd_settime(timer, 0, &setting, NULL);
    return timer;
}

int main(int count, char **arguments) {
    if (count != 4) {
        fprintf(stderr, "usage: mock_worker PORT TICK_US prefill|decode|any\n");
        return 2;
    }
    tick_us = atol(arguments[2]);
    is_prefill = strcmp(arguments[3], "prefill") == 0;
    signal(SIGTERM, stop);
    signal(SIGINT, stop);
    streams.next = streams.previous = &streams;
    poller = epoll_create1(0);
    Connection listener = {.fd = listen_on(atoi(arguments[1]))}, timer = {.fd = -1};
    watch(&listener, EPOLL_CTL_ADD, EPOLLIN);
    if (tick_us) {
        timer.fd = start_timer();
        watch(&timer, EPOLL_CTL_ADD, EPOLLIN);
    }
    struct epoll_event ready[MAX_EVENTS];
    while (!stopping) {
        int num_ready = epoll_wait(poller, ready, MAX_EVENTS, 1000);
        for (int i = 0; i < num_ready; i++) {
            Connection *connection = ready[i].data.ptr;
            if (connection == &listener) {
                accept_all(listener.fd);
            } else if (connection == &timer) {
                tick(timer.fd);
            } else {
                bool alive = !(ready[i].events & EPOLLOUT) || flush(connection);
                if (alive && ready[i].events & (EPOLLIN | EPOLLHUP | EPOLLERR)) alive = receive(connection);
                if (!alive) drop(connection);
            }
        }
    }
    return 0;
}
