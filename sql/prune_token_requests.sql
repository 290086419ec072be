-- Forget who asked for tokens longer than a minute ago.
-- Rows that are being counted in are left alone: waiting for two of them could be a deadlock.
delete from token_requests
where caller in (
    select caller
    from token_requests
    where since < clock_timestamp() - interval '1 minute'
    for update skip locked
)
