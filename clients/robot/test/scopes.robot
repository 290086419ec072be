*** Settings ***
Library          BotFarm    project=%{BOTFARM_PROJECT}    ttl=${3}    wait=${5}
Suite Setup      Acquire For The Suite
Test Teardown    Log    ${MINE.login} is still mine

*** Variables ***
${MINE}    ${None}
${NEXT}    the next

*** Keywords ***
Acquire For The Suite
    ${bot}=    Acquire Bot    role=admin
    VAR    ${OF SUITE}    ${bot}    scope=SUITE

*** Test Cases ***
A Test That Fails Gives Its User Back To ${NEXT}
    ${MINE}=    Acquire Bot    role=buyer
    VAR    ${MINE}    ${MINE}    scope=TEST
    Should Be Equal    ${MINE.login}    nobody

A Test Has What The One Before It Had
    Run Keyword And Expect Error    *user_id names one user*    Acquire Bot    user_id=${OF SUITE.user_id}    role=buyer
    ${MINE}=    Acquire Bot    role=buyer
    VAR    ${MINE}    ${MINE}    scope=TEST
    Should Not Be Equal    ${MINE.login}    ${OF SUITE.login}
    Release Bot    ${MINE}
    ${again}=    Acquire Bot    role=buyer
    Should Be Equal    ${MINE.login}    ${again.login}
    Should Be Equal    ${again.password}    pw-1
    Release Bot    ${again}    outcome=bad-login
    Acquire Bot    role=buyer

Of A Test That Is Skipped Nothing Is Told
    ${MINE}=    Acquire Bot    role=buyer
    VAR    ${MINE}    ${MINE}    scope=TEST
    Skip
